"""Keeps one worker's inventory on the ledger equal to its prefix cache, event by event or, failing that, as a whole.

Knows the order of events and when they must be given up for a whole new inventory. Does not know heartbeats.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Awaitable, Callable, Iterable, Sequence

from kvtransfer.ledger.records import merged
from kvtransfer.ledger.redis import MOST_HASHES_PER_EVENT, RedisLedger
from kvtransfer.ledger.replies import NotRegistered, OutOfStep
from kvtransfer.ledger.retry import keep_doing
from proto.ids import BlockHash, Epoch, WorkerId
from proto.inventory import CacheChange, Cleared

_BATCH = 64
_MOST_WAITING_HASHES = 65_536

Snapshooter = Callable[[], Awaitable[Sequence[BlockHash]]]
"""Reads the whole prefix cache. Every change made after it was read must be published after it was called."""


class InventoryWriter:
    """Call its methods from the event loop's thread.

    Two modes. In step: changes wait in order, are numbered when a batch is taken, and the batch is repeated as it was
    until Redis has answered. Out of step (at first, after an overflow, or when Redis lost or refused something): what
    waits is dropped, and then the cache is read; changes that come after the drop wait, and are applied on top. Some
    of those may be in the snapshot already, but the last change of each block decides, and that one is never missing.
    """

    def __init__(
        self,
        ledger: RedisLedger,
        worker: WorkerId,
        epoch: Epoch,
        snapshot: Snapshooter,
        *,
        most_waiting_hashes: int = _MOST_WAITING_HASHES,
    ) -> None:
        self._ledger = ledger
        self._worker = worker
        self._epoch = epoch
        self._snapshot = snapshot
        self._most_waiting_hashes = most_waiting_hashes
        self._waiting: collections.deque[CacheChange] = collections.deque()
        self._num_waiting_hashes = 0
        self._batch: tuple[CacheChange, ...] = ()
        self._last_numbered = 0
        self._last_acknowledged = 0
        self._is_registered = False
        self._must_replay = True
        self._wake = asyncio.Event()
        self._in_step = asyncio.Event()
        self._num_replays = 0
        self._num_overflows = 0

    @property
    def sequence(self) -> int:
        """The last number that Redis has confirmed."""
        return self._last_acknowledged

    @property
    def num_replays(self) -> int:
        """Whole inventories written."""
        return self._num_replays

    @property
    def num_overflows(self) -> int:
        return self._num_overflows

    def publish(self, changes: Iterable[CacheChange]) -> None:
        """Returns at once, and never raises."""
        for change in changes:
            self._waiting.append(change)
            self._num_waiting_hashes += _size(change)
        if self._num_waiting_hashes > self._most_waiting_hashes:
            self._num_overflows += 1
            self.replay()
        elif self._waiting:
            self._in_step.clear()
            self._wake.set()

    def replay(self) -> None:
        """Write everything anew, as soon as ``registered`` is known."""
        self._must_replay = True
        self._drop_waiting()
        self._in_step.clear()
        self._wake.set()

    def registered(self, sequence: int | None, confirmed_before: int) -> None:
        """A heartbeat came back with the ledger's ``sequence``. ``confirmed_before`` is our own from before it left:
        a ledger behind it has lost something."""
        self._is_registered = True
        if not self._must_replay and (sequence is None or sequence < confirmed_before):
            self.replay()
        self._wake.set()

    async def settled(self) -> None:
        """Waits until the ledger has everything that was published so far."""
        await self._in_step.wait()

    async def run(self) -> None:
        """Until cancelled."""
        await keep_doing("cache inventory", self._step)

    async def _step(self) -> None:
        await self._wake.wait()
        self._wake.clear()
        try:
            while self._is_registered and (self._must_replay or self._batch or self._waiting):
                if self._must_replay:
                    await self._write_whole()
                else:
                    await self._write_batch()
        except NotRegistered:
            self._is_registered = False  # the next heartbeat says when to go on
            self.replay()
        except OutOfStep:
            self.replay()
        except BaseException:
            self._wake.set()
            raise
        else:
            if self._is_registered:
                self._in_step.set()

    async def _write_whole(self) -> None:
        self._drop_waiting()
        self._must_replay = False  # an overflow from here on calls for another one
        # A fresh number even after a failure: a reader may have seen the last one.
        self._last_numbered += 1
        try:
            hashes = await self._snapshot()
            await self._ledger.replace(self._worker, self._epoch, self._last_numbered, hashes)
        except BaseException:
            self._must_replay = True
            raise
        self._last_acknowledged = self._last_numbered
        self._num_replays += 1

    async def _write_batch(self) -> None:
        if not self._batch:
            self._batch = self._take_batch()
            self._last_numbered += len(self._batch)
        first = self._last_numbered - len(self._batch) + 1
        last = await self._ledger.publish(self._worker, self._epoch, first, self._batch)
        self._last_acknowledged = last
        self._batch = ()

    def _take_batch(self) -> tuple[CacheChange, ...]:
        waiting = list(merged(self._waiting, MOST_HASHES_PER_EVENT))
        self._waiting = collections.deque(waiting[_BATCH:])
        self._num_waiting_hashes = sum(_size(change) for change in self._waiting)
        return tuple(waiting[:_BATCH])

    def _drop_waiting(self) -> None:
        self._waiting.clear()
        self._batch = ()
        self._num_waiting_hashes = 0


def _size(change: CacheChange) -> int:
    return 1 if isinstance(change, Cleared) else 1 + len(change.hashes)
