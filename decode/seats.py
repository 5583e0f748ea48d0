"""What a decode worker knows of one try of one request, as a type per situation.

A seat is taken by whichever comes first, the router's Attach or the prefill worker's Offer. It needs both the request
(from Attach) and the KV (adopted, or computed here) before it runs:

    Attach ─┐
            ├─▶ running ─▶ done (kept until its lease ends, so that a router that reconnects can be told again)
    KV ─────┘
"""

from __future__ import annotations

from dataclasses import dataclass, field

from proto.control import Attach
from proto.handoff import SealedChoice
from proto.ids import BlockHash, Generation, RequestId, try_id
from proto.lifecycle import Stage
from proto.request import Request, TokenOut
from worker.stages import StageClock


@dataclass(slots=True, eq=False)
class Seat:
    request: RequestId
    generation: Generation
    attach: Attach | None = None
    hashes: tuple[BlockHash, ...] = ()
    """What the prompt's blocks were offered as."""
    is_receiving: bool = False
    """Its hand-off may be writing into reserved blocks: only the receive session's ``freed`` gives them back."""
    arrived: tuple[SealedChoice, ...] | None = None
    """The first tokens, once every block is here and verified."""
    must_compute: bool = False
    """The KV that came was damaged: this worker computes the prompt itself."""
    is_running: bool = False
    num_cached: int = 0
    clock: StageClock = field(default_factory=lambda: StageClock(Stage.ROUTED))
    open_choices: set[int] = field(default_factory=set)
    stopped: set[int] = field(default_factory=set)
    """Choices that the router wants no more of, perhaps from before they ran."""
    emitted: list[TokenOut] = field(default_factory=list)
    """Every token made here, for a router that comes back and asks from a position."""

    @property
    def key(self) -> RequestId:
        """The engine's name for this try."""
        return try_id(self.request, self.generation)

    @property
    def is_done(self) -> bool:
        return self.is_running and not self.open_choices

    def begin(self, request: Request) -> None:
        """The engine gets the request."""
        self.is_running = True
        self.open_choices = set(range(request.params.n)) - self.stopped

    def stop(self, choice: int) -> None:
        """No more of it is wanted, or it has ended without news of ours. Idempotent."""
        self.stopped.add(choice)
        self.open_choices.discard(choice)

    def record(self, token: TokenOut) -> None:
        self.emitted.append(token)
        if token.finish is not None:
            self.open_choices.discard(token.choice)

    def since(self, positions: tuple[int, ...]) -> list[TokenOut]:
        """Tokens at or after ``positions`` (one per choice; empty: all)."""
        if not positions:
            return list(self.emitted)
        return [token for token in self.emitted if token.position >= positions[token.choice]]
