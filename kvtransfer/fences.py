"""Which try of a request is the newest, and what was refused for not being it.

    unknown ──open(g)──▶ live at g ──close──▶ tombstone at g ──retention──▶ unknown
                           │  ▲                   │
                           └──┘ open(g' > g): the older try is told that it is superseded
                                                  └── open(g' > g) ──▶ live at g'

A try at or below the highest generation seen is refused: that one try is live, and every other copy of it is a
duplicate. A tombstone outlives the request's timeout, so a duplicate revives nothing; tombstones are the only memory
kept per request, and time bounds them. Knows generations and epochs; knows nothing of blocks.
"""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from proto.errors import StaleMessage
from proto.handoff import Fence
from proto.ids import Epoch, Generation, RequestId

NO_GENERATION = Generation(0)


class Refused(enum.Enum):
    """Why a message was refused. Refusals are counted, never applied, never fatal."""

    STALE_GENERATION = "stale_generation"
    FOREIGN_EPOCH = "foreign_epoch"
    UNKNOWN = "unknown"
    LATE = "late"
    """Of the try that it names, which is over."""
    DUPLICATE = "duplicate"
    """A block that is here already."""
    MALFORMED = "malformed"
    """Undecodable, or not for its sender to say."""


class Refusals:
    """What one worker did not apply: messages by reason, and blocks whose bytes were not right. Totals."""

    def __init__(self) -> None:
        self._counts: Counter[Refused] = Counter()
        self._num_damaged = 0

    def add(self, reason: Refused) -> None:
        self._counts[reason] += 1

    def add_damaged(self) -> None:
        """A block did not match its checksum: here on D, and on P where D says so."""
        self._num_damaged += 1

    @property
    def num_damaged(self) -> int:
        return self._num_damaged

    def by_reason(self) -> Mapping[str, int]:
        """Every reason, also those that did not come up."""
        return {reason.value: self._counts[reason] for reason in Refused}

    def __getitem__(self, reason: Refused) -> int:
        return self._counts[reason]

    @property
    def total(self) -> int:
        return self._counts.total()


def why_refused(message: Fence, expected: Fence) -> Refused:
    """What is wrong with a fence that is not ``expected``."""
    if message.request != expected.request:
        return Refused.UNKNOWN
    if (message.prefill_epoch, message.decode_epoch) != (expected.prefill_epoch, expected.decode_epoch):
        # A redirect changes generation and decode epoch together: the older generation is the better explanation.
        return Refused.STALE_GENERATION if message.generation < expected.generation else Refused.FOREIGN_EPOCH
    return Refused.STALE_GENERATION if message.generation < expected.generation else Refused.UNKNOWN


@dataclass(slots=True)
class _Live:
    generation: Generation
    superseded: Callable[[Generation], None]


class FenceTable:
    """The tries that one decode worker has seen. Not thread-safe; ``now`` is the caller's monotonic clock, in seconds.

    ``retention_s`` must exceed the longest time that a request may take. ``refusals``: where to count.
    """

    def __init__(self, epoch: Epoch, retention_s: float, refusals: Refusals | None = None) -> None:
        self.epoch = epoch
        self.refusals = Refusals() if refusals is None else refusals
        self._retention_s = retention_s
        self._live: dict[RequestId, _Live] = {}
        self._tombstones: OrderedDict[RequestId, tuple[Generation, float]] = OrderedDict()

    @property
    def num_known(self) -> int:
        """Requests of which anything is remembered."""
        return len(self._live) + len(self._tombstones)

    def highest(self, request: RequestId) -> Generation:
        """The newest generation seen; 0 where nothing is known."""
        live = self._live.get(request)
        tombstone = self._tombstones.get(request)
        return max(live.generation if live else NO_GENERATION, tombstone[0] if tombstone else NO_GENERATION)

    def is_over(self, request: RequestId, generation: Generation) -> bool:
        """Whether that try has ended, or a newer one is known."""
        tombstone = self._tombstones.get(request)
        is_buried = tombstone is not None and tombstone[0] >= generation
        return is_buried or self.highest(request) > generation

    def open(self, fence: Fence, now: float, superseded: Callable[[Generation], None]) -> None:
        """Admits a new try and tells the older one of the same request, if any, that it is over.

        ``superseded`` is called, with the newer generation, when this try is overtaken before ``close``.
        Raises StaleMessage, and counts it.
        """
        self._bury(now)
        if fence.decode_epoch != self.epoch:
            raise self._stale(Refused.FOREIGN_EPOCH, fence)
        if fence.generation <= self.highest(fence.request):
            raise self._stale(Refused.STALE_GENERATION, fence)
        older = self._live.get(fence.request)
        self._live[fence.request] = _Live(fence.generation, superseded)
        self._tombstones.pop(fence.request, None)
        if older is not None:
            older.superseded(fence.generation)

    def close(self, fence: Fence, now: float) -> None:
        """Ends a try: its tombstone stays. May be called twice, and after a newer try was opened."""
        live = self._live.get(fence.request)
        if live is not None and live.generation == fence.generation:
            del self._live[fence.request]
        self._entomb(fence.request, fence.generation, now)

    def end(self, request: RequestId, generation: Generation, now: float) -> None:
        """The router lets go of the request's tries up to ``generation``; later offers of them are stale."""
        live = self._live.get(request)
        if live is not None and live.generation <= generation:
            del self._live[request]
            self._entomb(request, generation, now)
            live.superseded(generation)
        else:
            self._entomb(request, generation, now)

    def _entomb(self, request: RequestId, generation: Generation, now: float) -> None:
        self._bury(now)
        known = self._tombstones.get(request, (NO_GENERATION, 0.0))[0]
        self._tombstones[request] = (max(known, generation), now + self._retention_s)
        self._tombstones.move_to_end(request)

    def _bury(self, now: float) -> None:
        """Forgets tombstones whose time is over; they lie in order of it."""
        while self._tombstones:
            request, (_, until) = next(iter(self._tombstones.items()))
            if until > now:
                return
            del self._tombstones[request]

    def _stale(self, reason: Refused, fence: Fence) -> StaleMessage:
        self.refusals.add(reason)
        return StaleMessage(f"{reason.value}: {fence}", highest=self.highest(fence.request))
