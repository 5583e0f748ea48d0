"""One prompt on a prefill worker, from the router's Prefill until its blocks are let go."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvtransfer.send_session import SendSession
from proto.control import Peer, Prefill
from proto.ids import Generation, RequestId, try_id
from proto.lifecycle import Stage
from proto.request import Request
from worker.stages import StageClock


@dataclass(slots=True, eq=False)
class Job:
    """``generation`` and ``decode`` change with a Redirect; ``key``, the engine's name for it, stays."""

    request: Request
    generation: Generation
    decode: Peer
    lease_s: float
    key: RequestId
    clock: StageClock = field(default_factory=lambda: StageClock(Stage.ROUTED))
    num_cached: int = 0
    is_computed: bool = False
    is_held: bool = False
    """Nobody takes the blocks at present: the decode worker refused, or is lost."""
    transport: str = ""
    session: SendSession | None = None

    @classmethod
    def of(cls, message: Prefill) -> Job:
        request, generation = message.request, message.generation
        return cls(request, generation, message.decode, message.lease_s, try_id(request.id, generation))
