"""The prefill side of one hand-off, sans I/O: moves and messages go in, messages and notices come out.

The caller passes the time, carries what ``outbox`` holds over whatever link it has, in its own time, and acts on
``take_notices()``. Several tries (generations) may follow each other, each with an outbox of its own, because each
goes to another decode worker.

Lives over a link that loses, delays, repeats and reorders, if ``rto_s`` is given: what has no answer is sent again.
Knows block indices; knows nothing of block ids, bytes, links, threads or event loops.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from itertools import islice

from kvtransfer.fences import Refusals, Refused, why_refused
from kvtransfer.states import SEND, Ours, SendState, Theirs, after
from proto.errors import LocalProtocolError, RemoteProtocolError
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
    SealedChoice,
    Stale,
    Withdraw,
)
from proto.ids import Epoch, Generation

MAX_BACKOFF = 8
"""The longest wait before sending again, in multiples of ``rto_s``."""
HEARTBEATS_PER_LEASE = 3

Control = Offer | Seal | Withdraw | Stale


@dataclass(frozen=True, slots=True)
class SendBlock:
    """Send block ``index`` as a Frame."""

    index: int


@dataclass(frozen=True, slots=True)
class Granted:
    num_present: int
    transport: str


@dataclass(frozen=True, slots=True)
class Held:
    """The blocks are kept, and nobody has them. ``reason`` None: the decode worker is lost."""

    reason: RefuseReason | None
    message: str = ""
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Delivered:
    """The decode worker owns the request's KV."""


@dataclass(frozen=True, slots=True)
class Released:
    """The end, exactly once: the blocks need not be kept any longer."""

    reason: str


Notice = Granted | Held | Delivered | Released


class Outbox:
    """What is to be sent under one fence, in order. ``is_closed``: nothing more will come once it is empty."""

    def __init__(self, fence: Fence, now: float) -> None:
        self.fence = fence
        self.is_closed = False
        self.last_taken = now
        self._items: deque[Control | SendBlock] = deque()

    def __len__(self) -> int:
        return len(self._items)

    def next(self, now: float) -> Control | SendBlock | None:
        if not self._items:
            return None
        self.last_taken = now
        return self._items.popleft()

    def upcoming(self, most: int) -> list[SendBlock]:
        """The blocks that come next, before anything else, ``most`` of them at most. They stay where they are."""
        blocks: list[SendBlock] = []
        for item in islice(self._items, most):
            if not isinstance(item, SendBlock):
                break
            blocks.append(item)
        return blocks

    def put(self, item: Control | SendBlock) -> None:
        self._items.append(item)

    def close(self, farewell: Withdraw | None) -> None:
        self._items.clear()
        self.is_closed = True
        if farewell is not None:
            self._items.append(farewell)


class Sender:
    """Hands over the blocks of one prompt. Its lease of ``offer.lease_s`` runs from the start."""

    def __init__(self, offer: Offer, refusals: Refusals, now: float, *, rto_s: float | None = None) -> None:
        if not offer.hashes or offer.lease_s <= 0:
            raise LocalProtocolError("an offer has blocks and a lease")
        self.state = SendState.HELD
        self.num_resent = 0
        self._offer = offer
        self._refusals = refusals
        self._rto_s = rto_s
        self._lease_end = now + offer.lease_s
        self._outbox = Outbox(offer.fence, now)
        self._notices: list[Notice] = []
        self._num_ready = 0
        self._seal: Seal | None = None
        self._has_offered = False
        # What the current decode worker has answered.
        self._granted_as: Grant | None = None
        self._num_sent = 0
        self._num_acked = 0
        self._backoff = 1
        self._last_progress = now

    # What anyone may read.

    @property
    def fence(self) -> Fence:
        return self._offer.fence

    @property
    def outbox(self) -> Outbox:
        """The current try's."""
        return self._outbox

    @property
    def transport(self) -> str | None:
        """What the decode worker chose; None until it has granted room."""
        return self._granted_as.transport if self._granted_as else None

    @property
    def num_acked(self) -> int:
        """Leading blocks that the decode worker has, the present ones included."""
        return self._num_acked

    @property
    def is_released(self) -> bool:
        return self.state is SendState.RELEASED

    def take_notices(self) -> list[Notice]:
        notices, self._notices = self._notices, []
        return notices

    def deadline(self) -> float:
        """When ``tick`` will next have something to do."""
        if self._outbox or not self._is_open:
            return self._lease_end
        return min(self._lease_end, self._next_repeat())

    # Our own moves. Each raises LocalProtocolError where the table does not list it.

    def offer(self, now: float) -> None:
        """Asks the decode worker for room."""
        self._move(Ours.OFFER)
        self._begin(now)

    def blocks_ready(self, num_ready: int, now: float) -> None:
        """The first ``num_ready`` blocks are computed and will not change."""
        if self.is_released or self._seal is not None:
            raise LocalProtocolError(f"blocks became ready while {self.state.value}")
        if not self._num_ready <= num_ready <= len(self._offer.hashes):
            raise LocalProtocolError(f"{num_ready} blocks ready after {self._num_ready} of {len(self._offer.hashes)}")
        self._num_ready = num_ready
        self._send_what_is_due(now)

    def seal(self, num_tokens_last: int, choices: tuple[SealedChoice, ...], now: float) -> None:
        """The prompt is computed and its first tokens are sampled. The Seal goes out behind the last block."""
        num_blocks = len(self._offer.hashes)
        if self.is_released or self._seal is not None:
            raise LocalProtocolError(f"sealed while {self.state.value}, or for the second time")
        if self._num_ready != num_blocks or len(choices) != self._offer.num_choices:
            raise LocalProtocolError(f"sealed {self._num_ready} of {num_blocks} blocks, {len(choices)} choices")
        self._seal = Seal(self.fence, num_blocks, num_tokens_last, choices)
        self._send_what_is_due(now)

    def redirect(self, generation: Generation, decode_epoch: Epoch, now: float) -> Outbox:
        """Offers the blocks to another decode worker, under a higher generation; the old one gets a Withdraw.

        Returns the new outbox. The old one is closed, and holds the Withdraw if one is due.
        """
        if generation <= self.fence.generation:
            raise LocalProtocolError(f"redirected to generation {generation}, after {self.fence.generation}")
        farewell = Withdraw(self.fence, "redirected") if self._is_open else None
        self._move(Ours.REDIRECT)
        self._notices.clear()  # untold news of the last try, which is of no use to anybody now
        self._outbox.close(farewell)
        fence = self.fence.redirected(generation, decode_epoch)
        self._offer = replace(self._offer, fence=fence)
        if self._seal is not None:
            self._seal = replace(self._seal, fence=fence)
        self._outbox = Outbox(fence, now)
        self._begin(now)
        return self._outbox

    def withdraw(self, reason: str) -> None:
        """Aborted, or finished at the first token. May be called in any state, and twice."""
        if not self.is_released:
            self._release(reason, tell=True)

    def renew(self, lease_s: float, now: float) -> None:
        """The lease ends ``lease_s`` from now; the decode worker learns it with the next repeat of the Offer."""
        if not self.is_released:
            self._lease_end = now + lease_s
            self._offer = replace(self._offer, lease_s=lease_s)

    def lost(self, fence: Fence) -> None:
        """The link of that fence's try is gone. Nothing, where it was over already."""
        if self._is_open and fence == self.fence:
            self._hold(Ours.LOST, Held(None, "the link is lost"))

    def tick(self, now: float) -> None:
        """Ends the lease and sends again, where it is time."""
        if self.is_released:
            return
        if now >= self._lease_end:
            self._release("the lease has ended", tell=True)
        elif self._is_open and not self._outbox and now >= self._next_repeat():
            self._repeat(now)

    # The peer's messages.

    def receive(self, message: HandoffMessage, now: float) -> Stale | None:
        """Applies the message, or refuses and counts it where its fence is not ours, or its try is over.

        Returns what to answer to a refused one, on the link that brought it. Raises RemoteProtocolError where the peer
        may not say that; nothing has changed then, and the caller counts it.
        """
        if message.fence != self.fence:
            self._refusals.add(why_refused(message.fence, self.fence))
            return None if isinstance(message, Stale) else Stale(message.fence, self.fence.generation)
        if not self._is_open and self._has_offered:
            # An echo of a try that is over for us; whoever ended it has told the other side.
            if not isinstance(message, Refuse | Stale):
                self._refusals.add(Refused.LATE)
            return None
        self._apply(message, now)
        return None

    def _apply(self, message: HandoffMessage, now: float) -> None:
        match message:
            case Grant():
                self._granted(message, now)
            case Ack(upto=upto):
                self._acked(upto, now)
            case Nack(index=index):
                self._nacked(index)
            case Adopted():
                self._adopted()
            case Refuse():
                self._hold(Theirs.REFUSE, Held(message.reason, message.message, message.retry_after_s))
            case Stale(highest=highest):
                self._outdated(highest)
            case Offer() | Frame() | Seal() | Withdraw():
                raise RemoteProtocolError(f"{type(message).__name__} from a decode worker")

    def _granted(self, grant: Grant, now: float) -> None:
        following = after(SEND, self.state, Theirs.GRANT)
        if self._granted_as is not None:
            if grant != self._granted_as:
                raise RemoteProtocolError(f"granted {grant} after {self._granted_as}")
            return
        if grant.num_present > len(self._offer.hashes):
            raise RemoteProtocolError(f"{grant.num_present} of {len(self._offer.hashes)} blocks are present")
        if grant.transport not in {transport.name for transport in self._offer.transports}:
            raise RemoteProtocolError(f"transport {grant.transport!r} was not offered")
        self.state = following
        self._granted_as = grant
        self._num_acked = self._num_sent = grant.num_present
        self._backoff = 1
        self._notices.append(Granted(grant.num_present, grant.transport))
        self._send_what_is_due(now)

    def _acked(self, upto: int, now: float) -> None:
        following = after(SEND, self.state, Theirs.ACK)
        if upto > self._num_sent:
            raise RemoteProtocolError(f"acknowledged {upto} blocks of {self._num_sent} sent")
        self.state = following
        if upto > self._num_acked:
            self._num_acked = upto
            self._backoff = 1
            self._last_progress = now

    def _nacked(self, index: int) -> None:
        following = after(SEND, self.state, Theirs.NACK)
        if index >= self._num_sent:
            raise RemoteProtocolError(f"block {index} was refused, of {self._num_sent} sent")
        self.state = following
        if index >= self._num_acked:
            self._refusals.add_damaged()
            self._resend(index)

    def _adopted(self) -> None:
        self._move(Theirs.ADOPTED)
        self._notices.append(Delivered())
        self._release("adopted", tell=False)

    def _outdated(self, highest: Generation) -> None:
        if highest < self.fence.generation:
            # It never saw this try: another incarnation answers at the address of the one we mean, which is lost.
            self._hold(Ours.LOST, Held(None, "the decode worker has restarted"))
        else:
            # Whoever ended it may have another in mind for the blocks: only the router and the lease let go of them.
            self._hold(Theirs.STALE, Held(RefuseReason.STALE, "this try is over at the decode worker"))

    # How moves are made.

    @property
    def _is_open(self) -> bool:
        """An Offer of the current try is out, and neither side has ended it."""
        return self.state in (SendState.OFFERED, SendState.STREAMING, SendState.SEALED)

    def _move(self, event: Ours | Theirs) -> None:
        self.state = after(SEND, self.state, event)

    def _begin(self, now: float) -> None:
        self._has_offered = True
        self._granted_as = None
        self._num_sent = self._num_acked = 0
        self._backoff = 1
        self._last_progress = now
        self._outbox.put(self._offer)

    def _send_what_is_due(self, now: float) -> None:
        if self.state is not SendState.STREAMING:
            return
        self._last_progress = now
        for index in range(self._num_sent, self._num_ready):
            self._outbox.put(SendBlock(index))
        self._num_sent = max(self._num_sent, self._num_ready)
        if self._seal is not None:
            self._move(Ours.SEAL)
            self._outbox.put(self._seal)

    def _hold(self, event: Ours | Theirs, notice: Held) -> None:
        self._move(event)
        self._outbox.close(None)
        self._notices.append(notice)

    def _release(self, reason: str, *, tell: bool) -> None:
        farewell = Withdraw(self.fence, reason) if tell and self._is_open else None
        self._move(Ours.RELEASE)
        self._outbox.close(farewell)
        self._notices.append(Released(reason))

    # Sending again.

    def _next_repeat(self) -> float:
        """The decode worker's lease wants news now and then; a lossy link wants everything unanswered again."""
        heartbeat = self._outbox.last_taken + self._offer.lease_s / HEARTBEATS_PER_LEASE
        if self._rto_s is None or not self._is_unanswered:
            return heartbeat
        return min(heartbeat, max(self._outbox.last_taken, self._last_progress) + self._rto_s * self._backoff)

    @property
    def _is_unanswered(self) -> bool:
        return self.state is not SendState.STREAMING or self._num_acked < self._num_sent

    def _repeat(self, now: float) -> None:
        self._outbox.last_taken = now
        if self._rto_s is not None and self.state is not SendState.OFFERED:
            for index in range(self._num_acked, self._num_sent):
                self._resend(index)
        self._backoff = min(self._backoff * 2, MAX_BACKOFF)
        if self.state is SendState.SEALED:
            assert self._seal is not None
            self._outbox.put(self._seal)
        else:
            self._outbox.put(self._offer)

    def _resend(self, index: int) -> None:
        self.num_resent += 1
        self._outbox.put(SendBlock(index))
