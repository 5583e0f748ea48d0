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
from proto.request import TokenOut


@dataclass(frozen=True, slots=True)
class Arrived:
    """The prompt's KV is here, verified. ``hashes`` are what it was offered as."""

    hashes: tuple[BlockHash, ...]
    choices: tuple[SealedChoice, ...]
    num_bytes: int
    duration_s: float


@dataclass(slots=True)
class Seat:
    request: RequestId
    generation: Generation
    attach: Attach | None = None
    arrived: Arrived | None = None
    must_compute: bool = False
    """The KV that came was damaged: this worker computes the prompt itself."""
    is_running: bool = False
    open_choices: set[int] = field(default_factory=set)
    emitted: list[TokenOut] = field(default_factory=list)
    """Every token made here, for a router that comes back and asks from a position."""

    @property
    def key(self) -> RequestId:
        """The engine's name for this try."""
        return try_id(self.request, self.generation)

    @property
    def is_done(self) -> bool:
        return self.is_running and not self.open_choices

    def record(self, token: TokenOut) -> None:
        self.emitted.append(token)
        if token.finish is not None:
            self.open_choices.discard(token.choice)

    def since(self, positions: tuple[int, ...]) -> list[TokenOut]:
        """Tokens at or after ``positions`` (one per choice; empty: all)."""
        if not positions:
            return list(self.emitted)
        return [token for token in self.emitted if token.position >= positions[token.choice]]
