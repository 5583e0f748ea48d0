"""A router's eye on the ledger: who is alive and what each has cached, learned from the stream within milliseconds.

Knows how to stay right about it: gaps, restarts, an emptied Redis. Does not know what the news is used for. When Redis
is away the last known state stands; a record that is missing there ejects nobody before it had time to come back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kvtransfer.ledger.records import (
    InventoryChange,
    InventoryEvent,
    Joined,
    LedgerEvent,
    Left,
    Replaced,
    WorkerRecord,
)
from kvtransfer.ledger.redis import RedisLedger
from kvtransfer.ledger.replies import Members
from kvtransfer.ledger.retry import keep_doing
from proto.ids import Epoch, WorkerId

log = logging.getLogger(__name__)

WorkersChanged = Callable[[list[WorkerRecord]], None]
"""Everyone known, whenever a record in it differs. An epoch that is no longer in it takes its inventory along."""

InventoryChanged = Callable[[Epoch, InventoryChange], None]
"""What an incarnation's inventory gained or lost; a Snapshot takes the place of all that was known."""


class LedgerWatcher:
    """Calls back from its own task on the event loop: first the workers, then their inventories.

    ``poll_s`` is how often the whole of the ledger is compared with what is known, which is how expired workers and
    events that were trimmed unseen are noticed. The ledger stays the caller's to close, after this.
    """

    def __init__(
        self,
        ledger: RedisLedger,
        *,
        workers_changed: WorkersChanged,
        inventory_changed: InventoryChanged,
        poll_s: float = 1.0,
    ) -> None:
        self._ledger = ledger
        self._tell_workers = workers_changed
        self._tell_inventory = inventory_changed
        self._poll_s = poll_s
        self._workers: dict[WorkerId, WorkerRecord] = {}
        self._sequences: dict[Epoch, int] = {}
        """Of each known incarnation, the last event that was told, or the snapshot's."""
        self._cursor: str | None = None
        self._nonce: str | None = None
        self._is_connected = False
        self._trouble = "it has not been read yet"
        self._members_changed = False
        self._next_poll = 0.0
        self._expel_from = 0.0
        self._synced = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._num_snapshots = 0
        self._num_resets = 0

    @property
    def is_connected(self) -> bool:
        return self._is_connected

    @property
    def trouble(self) -> str:
        """Why the ledger could not be read the last time that it could not."""
        return self._trouble

    @property
    def workers(self) -> list[WorkerRecord]:
        """The last known ones."""
        return list(self._workers.values())

    @property
    def num_snapshots(self) -> int:
        """Inventories read as a whole: one for each incarnation, and one for each gap."""
        return self._num_snapshots

    @property
    def num_resets(self) -> int:
        """Times that Redis was found emptied."""
        return self._num_resets

    def start(self) -> None:
        """Begins to watch. Returns at once, whether Redis is there or not."""
        assert self._task is None, "already started"
        self._task = asyncio.create_task(keep_doing("ledger watch", self._step, self._lost), name="ledger-watch")

    async def synced(self) -> None:
        """Waits until the ledger has been read once."""
        await self._synced.wait()

    async def close(self) -> None:
        """May be called twice."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _step(self) -> None:
        now = asyncio.get_running_loop().time()
        if not self._is_connected:
            self._expel_from = now + self._ledger.ttl_s
            await self._compare()
            self._is_connected = True
            self._synced.set()
        elif self._members_changed or now >= self._next_poll:
            await self._compare()
        else:
            await self._follow(wait_s=self._next_poll - now)

    def _lost(self, why: str) -> None:
        self._is_connected = False
        self._trouble = why

    async def _follow(self, wait_s: float) -> None:
        assert self._cursor is not None
        await self._take_all(*await self._ledger.read_events(self._cursor, wait_s=wait_s))

    async def _catch_up(self, last: str) -> None:
        while self._cursor is not None and _position(self._cursor) < _position(last):
            await self._take_all(*await self._ledger.read_events_until(self._cursor, last))

    async def _take_all(self, events: list[LedgerEvent], cursor: str) -> None:
        for event in events:
            await self._take(event)
        # Only now: when a snapshot fails half-way, the events after it are read again, and those that were told are
        # known by their number.
        self._cursor = cursor

    async def _take(self, event: LedgerEvent) -> None:
        match event:
            case Joined():
                self._members_changed = True
            case Left(worker, epoch):
                known = self._workers.get(worker)
                if known is not None and known.epoch == epoch:
                    del self._workers[worker]
                    self._sequences.pop(epoch, None)
                    self._tell_workers(self.workers)
            case InventoryEvent():
                await self._take_inventory(event)

    async def _take_inventory(self, event: InventoryEvent) -> None:
        known = self._sequences.get(event.epoch)
        if known is None:
            # Not told to anybody yet, or nobody's any more. If it is a member, comparing finds it.
            if any(record.epoch == event.epoch for record in self._workers.values()):
                await self._snapshot(event.epoch)
            return
        if event.sequence <= known:
            return
        if isinstance(event.change, Replaced) or event.sequence > known + 1:
            await self._snapshot(event.epoch)
            return
        self._sequences[event.epoch] = event.sequence
        self._tell_inventory(event.epoch, event.change)

    async def _snapshot(self, epoch: Epoch) -> None:
        snapshot = await self._ledger.snapshot(epoch)
        if snapshot is None:
            return  # gone again; whoever comes next is announced
        self._num_snapshots += 1
        self._sequences[epoch] = snapshot.sequence
        self._tell_inventory(epoch, snapshot)

    async def _compare(self) -> None:
        """Makes what is known equal to what is on the ledger at this moment."""
        members = await self._ledger.members()
        self._next_poll = asyncio.get_running_loop().time() + self._poll_s
        self._notice_reset(members)
        if self._cursor is None:
            self._cursor = members.tail
        # The events up to this very moment, so that an inventory which is behind afterwards has truly missed some.
        await self._catch_up(members.tail)
        self._members_changed = False
        self._notice_workers(members)
        for record, sequence in members.workers:
            if sequence is not None and self._sequences.get(record.epoch, -1) < sequence:
                await self._snapshot(record.epoch)

    def _notice_reset(self, members: Members) -> None:
        if self._nonce not in (None, members.nonce):
            log.warning("Redis was emptied; keeping what is known until the workers have written it again")
            self._num_resets += 1
            self._cursor = "0-0"
            self._expel_from = asyncio.get_running_loop().time() + self._ledger.ttl_s
        self._nonce = members.nonce

    def _notice_workers(self, members: Members) -> None:
        present = {record.worker: record for record, _ in members.workers}
        may_expel = asyncio.get_running_loop().time() >= self._expel_from
        kept = {} if may_expel else {name: known for name, known in self._workers.items() if name not in present}
        workers = present | kept
        if workers == self._workers:
            return
        self._workers = workers
        epochs = {record.epoch for record in workers.values()}
        self._sequences = {epoch: sequence for epoch, sequence in self._sequences.items() if epoch in epochs}
        self._tell_workers(self.workers)


def _position(stream_id: str) -> tuple[int, int]:
    milliseconds, _, number = stream_id.partition("-")
    return int(milliseconds), int(number)
