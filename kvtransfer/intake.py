"""What the two tiers are told of a hand-off, and what they are asked. Types only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from proto.handoff import Fence, Offer, RefuseReason, Seal
from proto.ids import BlockId

PEER_LOST: Literal["peer_lost"] = "peer_lost"


class SendEvents(Protocol):
    """The prefill tier's ear. Called on the event loop; must not block or raise."""

    def granted(self, num_present: int, transport: str) -> None:
        """The decode worker has room, and needs the blocks from ``num_present`` on."""

    def held(self, reason: RefuseReason | Literal["peer_lost"], message: str) -> None:
        """Nobody takes the blocks now. They are kept under the lease, for a redirect."""

    def adopted(self, num_bytes: int, duration_s: float) -> None:
        """The decode worker owns the request's KV. ``released`` follows."""

    def released(self) -> None:
        """The end, exactly once: nothing reads the blocks any more."""


class Reservation(Protocol):
    """Room for one prompt: a block for each of its blocks, the first ``num_present`` of them filled already."""

    @property
    def blocks(self) -> Sequence[BlockId]: ...

    @property
    def num_present(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Refusal:
    reason: RefuseReason
    message: str = ""
    retry_after_s: float | None = None


class Intake(Protocol):
    """The decode tier's side. Calls for one hand-off come one after another and are never cancelled."""

    async def reserve(self, offer: Offer) -> Reservation | Refusal | RefuseReason:
        """Room for the whole prompt and its first growth, or a refusal; answers soon rather than waiting for room.

        Older tries of the same request are over, but what they held may still be on its way back.
        """

    async def sealed(self, fence: Fence, seal: Seal) -> None:
        """The first tokens are known; blocks may still be on their way."""

    async def adopted(self, fence: Fence, seal: Seal, num_bytes: int, duration_s: float) -> None:
        """Every block is verified: the reservation is the request's KV now. If this raises, ``freed`` follows."""

    async def freed(self, fence: Fence, num_verified: int, reason: str) -> None:
        """Give the reservation back; its first ``num_verified`` blocks are right. No copy into it is running.

        ``reason`` ``"corrupt"``: compute the prompt here instead, and tell the router, so that P may let go. After
        ``adopted`` this means that P or the router took the request back: abort it.
        """
