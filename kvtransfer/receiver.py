"""The decode side of one hand-off, sans I/O: messages and results go in, messages, copies and notices come out.

The caller passes the time, sends what ``next_output()`` gives, copies and verifies what ``take_frames()`` gives and
says how that went, and acts on ``take_notices()``: exactly one Verified or Freed for each reservation, and after
``adopted()`` at most one Freed, should P have taken the request back.

Everything that P may repeat is answered again and applied once, so P alone decides what to repeat.
Knows block indices; knows nothing of block ids, bytes, checksums, links, threads or event loops.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kvtransfer.arrivals import Added, Arrivals, Placed
from kvtransfer.fences import FenceTable, Refused, why_refused
from kvtransfer.sanity import check_frame, check_offer, check_seal
from kvtransfer.states import RECEIVE, Ours, ReceiveState, Theirs, after
from proto.errors import RemoteProtocolError, StaleMessage
from proto.handoff import (
    Ack,
    Adopted,
    Fence,
    Frame,
    Grant,
    HandoffMessage,
    Nack,
    Offer,
    Refuse,
    RefuseReason,
    Seal,
    Stale,
    Withdraw,
)
from proto.ids import Generation
from proto.layout import KvLayout

CORRUPT = "corrupt"
"""The reason of Freed when D is to go on alone, from the blocks that were verified."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Is there room for ``offer``? Answer with ``reserved`` or ``refused``."""

    offer: Offer


@dataclass(frozen=True, slots=True)
class Sealed:
    seal: Seal


@dataclass(frozen=True, slots=True)
class Verified:
    """Every block is right and in our memory. Make them the request's own, then call ``adopted`` or ``abort``."""

    seal: Seal


@dataclass(frozen=True, slots=True)
class Freed:
    """No copy is running any more: give the reservation back. Its first ``num_verified`` blocks are right."""

    num_verified: int
    reason: str


_MORTAL = frozenset({ReceiveState.IDLE, ReceiveState.RESERVED, ReceiveState.RECEIVING, ReceiveState.SEALED})
"""Where the lease may end. While our own side answers or adopts, it is not P that we wait for."""

Notice = Ask | Sealed | Verified | Freed
Control = Grant | Refuse | Ack | Nack | Adopted | Stale


class Receiver:
    """Takes over the blocks of one prompt. Until an Offer comes, a lease of ``patience_s`` runs."""

    def __init__(
        self,
        layout: KvLayout,
        fences: FenceTable,
        now: float,
        *,
        patience_s: float = 30.0,
        on_superseded: Callable[[], None] | None = None,
    ) -> None:
        self.state = ReceiveState.IDLE
        self.arrivals = Arrivals()
        self._layout = layout
        self._fences = fences
        self._on_superseded = on_superseded
        self._offer: Offer | None = None
        self._grant: Grant | None = None
        self._seal: Seal | None = None
        self._lease_s = patience_s
        self._lease_end = now + patience_s
        self._outputs: deque[Control] = deque()
        self._notices: list[Notice] = []
        self._ack_due = False
        self._farewell: Refuse | Stale | None = None
        self._is_lost = False
        self._is_reserving = False
        self._is_adopting = False
        self._free_reason: str | None = None

    # What anyone may read.

    @property
    def fence(self) -> Fence | None:
        return self._offer.fence if self._offer else None

    @property
    def is_over(self) -> bool:
        """FREED, and nothing is left to be told of it (``take_notices`` apart)."""
        return self.state is ReceiveState.FREED and not self._is_busy

    @property
    def is_adopted(self) -> bool:
        return self.state is ReceiveState.ADOPTED

    @property
    def has_output(self) -> bool:
        return bool(self._outputs) or self._ack_due

    def deadline(self) -> float:
        """When ``tick`` will have something to do."""
        return self._lease_end if self.state in _MORTAL else math.inf

    def take_notices(self) -> list[Notice]:
        notices, self._notices = self._notices, []
        return notices

    def take_frames(self, limit: int) -> list[Frame]:
        """Up to ``limit`` frames to copy into their blocks and verify there; each ends with ``placed``."""
        return self.arrivals.take(limit)

    def next_output(self) -> Control | None:
        if self._outputs:
            return self._outputs.popleft()
        if self._ack_due and self._offer is not None:
            self._ack_due = False
            return Ack(self._offer.fence, self.arrivals.num_verified)
        return None

    # Results of our own side.

    def reserved(self, num_present: int, transport: str, now: float) -> None:
        """Room is reserved; its first ``num_present`` blocks are here and pinned. The answer to Ask."""
        assert self._offer is not None
        self._is_reserving = False
        self.arrivals.begin(num_present)
        self._grant = Grant(self._offer.fence, num_present, transport)
        if self.state is ReceiveState.FREED:
            self._settle()  # Let go while it was asked: the reservation goes back at once.
            return
        self.state = after(RECEIVE, self.state, Ours.RESERVE)
        self._lease_end = now + self._lease_s
        self._outputs.append(self._grant)

    def refused(self, reason: RefuseReason, message: str = "", retry_after_s: float | None = None) -> None:
        """The other answer to Ask."""
        assert self._offer is not None
        self._is_reserving = False
        if self.state is not ReceiveState.FREED:
            self._refuse(reason, message, retry_after_s)

    def placed(self, index: int, is_right: bool) -> None:
        """A copy has ended, and the bytes in our memory match the frame's checksum or not."""
        if self.state is ReceiveState.FREED:
            self.arrivals.abandon(index)
            self._settle()
            return
        assert self._offer is not None
        if not is_right:
            self._fences.refusals.add_damaged()
        match self.arrivals.placed(index, is_right):
            case Placed.RIGHT:
                self._ack_due = True
            case Placed.DAMAGED:
                self._outputs.append(Nack(self._offer.fence, index))
            case Placed.HOPELESS:
                # P need send no more; the router, which hears of it from our tier, lets go of what P holds.
                self._free(Ours.FREE, CORRUPT, Stale(self._offer.fence, self._offer.fence.generation))
                return
        self._settle()

    def adopted(self) -> None:
        """The answer to Verified: the blocks are the request's own now."""
        assert self._offer is not None
        self._is_adopting = False
        if self.state is ReceiveState.FREED:
            self._settle()  # Taken back meanwhile: the new owner is told.
            return
        self.state = after(RECEIVE, self.state, Ours.ADOPT)
        self._ack_due = False
        self._outputs.append(Adopted(self._offer.fence))

    def not_adopted(self, reason: str) -> None:
        """The other answer to Verified."""
        self._is_adopting = False
        self.abort(reason)
        self._settle()

    # Our own moves.

    def abort(self, reason: str) -> None:
        """Lets go. May be called in any state, and twice; P hears that it may offer the blocks to another."""
        if self.state not in (ReceiveState.FREED, ReceiveState.DONE):
            refusal = Refuse(self._offer.fence, RefuseReason.STALE, reason) if self._offer else None
            self._free(Ours.FREE, reason, refusal)

    def superseded(self, highest: Generation) -> None:
        """A newer try exists, or the router has ended this one."""
        if self._offer is not None and self.state not in (ReceiveState.FREED, ReceiveState.DONE):
            self._free(Ours.FREE, "superseded", Stale(self._offer.fence, highest))
        if self._on_superseded is not None:
            self._on_superseded()

    def renew(self, lease_s: float, now: float) -> None:
        self._lease_s = lease_s
        self._lease_end = max(self._lease_end, now + lease_s)

    def lost(self) -> None:
        """The link to P is gone. What was sent before Seal is lost with it; after Seal, the blocks decide."""
        if self._is_lost or self.state is ReceiveState.FREED:
            return
        self._is_lost = True
        self._farewell = None
        following = after(RECEIVE, self.state, Ours.LOST)
        if following is ReceiveState.FREED:
            self._free(Ours.LOST, "peer_lost", None)
        else:
            self._settle()

    def tick(self, now: float) -> None:
        """Ends the lease, where nothing was heard of P for so long and the blocks are not on their way to an owner."""
        if self.state in _MORTAL and now >= self._lease_end:
            self.abort("the lease has ended")

    # P's messages.

    def receive(self, message: HandoffMessage, now: float) -> None:
        """Applies the message, or refuses and counts it where its fence is not ours, or its try is over.

        Raises RemoteProtocolError where the peer may not say that; nothing has changed then, and the caller counts it.
        """
        if self._offer is None:
            self._first(message, now)
        elif message.fence != self._offer.fence:
            self._refuse_fence(message, why_refused(message.fence, self._offer.fence))
        elif self.state is ReceiveState.FREED:
            self._refuse_late(message)
        else:
            self._apply(message)
            self._lease_end = max(self._lease_end, now + self._lease_s)

    def close(self, now: float) -> None:
        """The driver is done: the try's tombstone stays behind."""
        if self._offer is not None:
            self._fences.close(self._offer.fence, now)

    def _first(self, message: HandoffMessage, now: float) -> None:
        match message:
            case Offer() if self.state is ReceiveState.IDLE:
                self._offered(message, now)
            case Withdraw() if message.fence.decode_epoch == self._fences.epoch:
                # It has overtaken its Offer, which must find a closed door.
                self._fences.end(message.fence.request, message.fence.generation, now)
            case _:
                foreign = message.fence.decode_epoch != self._fences.epoch
                known = self._fences.highest(message.fence.request) > 0
                stale = Refused.STALE_GENERATION if known else Refused.UNKNOWN
                self._refuse_fence(message, Refused.FOREIGN_EPOCH if foreign else stale)

    def _refuse_fence(self, message: HandoffMessage, reason: Refused) -> None:
        self._fences.refusals.add(reason)
        if not isinstance(message, Stale):
            self._outputs.append(Stale(message.fence, self._fences.highest(message.fence.request)))

    def _refuse_late(self, message: HandoffMessage) -> None:
        if isinstance(message, Withdraw | Stale):
            return  # They end what has ended.
        self._fences.refusals.add(Refused.LATE)
        if self._farewell is not None:
            self._outputs.append(self._farewell)

    def _offered(self, offer: Offer, now: float) -> None:
        if offer.layout != self._layout.fingerprint():
            # Compared before anything else is believed: another layout's numbers mean other things.
            self._outputs.append(Refuse(offer.fence, RefuseReason.MISMATCH, self._mismatch(offer)))
            return
        check_offer(offer, self._layout)
        try:
            self._fences.open(offer.fence, now, self.superseded)
        except StaleMessage as stale:
            self._outputs.append(Stale(offer.fence, Generation(stale.highest)))
            return
        self.state = after(RECEIVE, self.state, Theirs.OFFER)
        self._offer = offer
        self._is_reserving = True
        self._lease_s = offer.lease_s
        self._lease_end = now + offer.lease_s
        self._notices.append(Ask(offer))

    def _apply(self, message: HandoffMessage) -> None:
        match message:
            case Offer():
                self._move(Theirs.OFFER)
                self._lease_s = message.lease_s
                if not self._say_adopted() and self._grant is not None:
                    self._outputs.append(self._grant)
            case Frame():
                self._framed(message)
            case Seal():
                self._sealed(message)
            case Withdraw(reason=reason):
                self._free(Theirs.WITHDRAW, f"withdrawn: {reason}", None)
            case Stale():
                self._free(Theirs.STALE, "stale", None)
            case _:
                raise RemoteProtocolError(f"{type(message).__name__} from a prefill worker")

    def _framed(self, frame: Frame) -> None:
        assert self._offer is not None
        following = after(RECEIVE, self.state, Theirs.FRAME)
        check_frame(frame, self._offer, self._grant.num_present if self._grant else 0, self._layout)
        self.state = following
        if self._say_adopted():
            self._fences.refusals.add(Refused.DUPLICATE)
            return
        added = self.arrivals.add(frame)
        if added is not Added.NEW:
            self._fences.refusals.add(Refused.DUPLICATE)
        if added is Added.VERIFIED:
            self._ack_due = True  # Perhaps the last Ack was lost.

    def _sealed(self, seal: Seal) -> None:
        assert self._offer is not None
        following = after(RECEIVE, self.state, Theirs.SEAL)
        check_seal(seal, self._offer, self._layout)
        if self._seal is not None and seal != self._seal:
            raise RemoteProtocolError("two seals that differ")
        self.state = following
        if self._say_adopted():
            return
        if self._seal is None:
            self._seal = seal
            self._notices.append(Sealed(seal))
        self._settle()

    # How moves are made.

    @property
    def _is_busy(self) -> bool:
        """Something that must end before the blocks can be given back."""
        return self.arrivals.is_copying or self._is_adopting or self._is_reserving

    def _move(self, event: Ours | Theirs) -> None:
        self.state = after(RECEIVE, self.state, event)

    def _settle(self) -> None:
        """What follows from the blocks that are here: on to VERIFIED, or the end of a lost or freed hand-off."""
        if self.state is ReceiveState.FREED:
            self._tell_freed()
        elif self.state is ReceiveState.SEALED:
            assert self._offer is not None
            assert self._seal is not None
            if self.arrivals.num_verified == len(self._offer.hashes):
                self._move(Ours.VERIFY)
                self._is_adopting = True
                self._notices.append(Verified(self._seal))
            elif self._is_lost and not self.arrivals.num_waiting and not self.arrivals.is_copying:
                self._free(Ours.FREE, "peer_lost", None)

    def _say_adopted(self) -> bool:
        if self.state is not ReceiveState.ADOPTED:
            return False
        assert self._offer is not None
        self._outputs.append(Adopted(self._offer.fence))
        return True

    def _refuse(self, reason: RefuseReason, message: str, retry_after_s: float | None) -> None:
        assert self._offer is not None
        self._move(Ours.REFUSE)
        self._farewell = Refuse(self._offer.fence, reason, message, retry_after_s)
        self._outputs.append(self._farewell)

    def _free(self, event: Ours | Theirs, reason: str, farewell: Refuse | Stale | None) -> None:
        self._move(event)
        self.arrivals.drop_waiting()
        self._ack_due = False
        self._outputs.clear()
        self._farewell = farewell
        if farewell is not None and not self._is_lost:
            self._outputs.append(farewell)
        if self._free_reason is None:
            self._free_reason = reason
        self._tell_freed()

    def _tell_freed(self) -> None:
        """Once, when there is a reservation to give back and no copy into it is running."""
        if self._grant is not None and not self._is_busy and self._free_reason is not None:
            reason, self._free_reason = self._free_reason, None
            self._notices.append(Freed(self.arrivals.num_verified, reason))

    def _mismatch(self, offer: Offer) -> str:
        return f"ours: {self._layout.describe()}; offered: {offer.layout_text}"
