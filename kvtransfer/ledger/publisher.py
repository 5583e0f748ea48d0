"""A worker's pen: its presence, its inventory and its hand-offs, written to the ledger in the background.

Knows when to write. Nothing in here raises to the worker or makes it wait: without a ledger a worker serves on, and
when the ledger is back it registers and replays its inventory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from kvtransfer.ledger.handoffs import HandoffWriter
from kvtransfer.ledger.inventory import InventoryWriter, Snapshooter
from kvtransfer.ledger.records import HandoffRecord, LedgerAway, WorkerRecord
from kvtransfer.ledger.redis import RedisLedger
from kvtransfer.ledger.retry import keep_doing
from proto.control import Load
from proto.inventory import CacheChange

log = logging.getLogger(__name__)

_LAST_WORDS_S = 1.0


@dataclass(frozen=True, slots=True)
class PublisherCounts:
    """Totals of one publisher."""

    num_replays: int
    """Whole inventories written; one is normal."""
    num_overflows: int
    """Times that too many inventory changes waited."""
    num_dropped_handoffs: int
    num_superseded: int
    """Heartbeats refused because a newer incarnation has this worker's name."""


class WorkerPublisher:
    """Call its methods from the event loop's thread.

    ``record`` describes the worker; its load is asked of ``load`` at each heartbeat. ``snapshot`` reads the whole
    prefix cache: every change made after it was read must be published after it was called. The ledger stays the
    caller's to close, after this.
    """

    def __init__(
        self,
        ledger: RedisLedger,
        record: WorkerRecord,
        *,
        load: Callable[[], Load],
        snapshot: Snapshooter,
        heartbeat_s: float = 1.0,
    ) -> None:
        self._ledger = ledger
        self._record = record
        self._load = load
        self._heartbeat_s = heartbeat_s
        self._inventory = InventoryWriter(ledger, record.worker, record.epoch, snapshot)
        self._handoffs = HandoffWriter(ledger)
        self._beat_now = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._has_registered = False
        self._is_connected = False
        self._num_superseded = 0
        self._nonce: str | None = None

    @property
    def is_connected(self) -> bool:
        """Whether the last heartbeat was answered."""
        return self._is_connected

    @property
    def counts(self) -> PublisherCounts:
        return PublisherCounts(
            num_replays=self._inventory.num_replays,
            num_overflows=self._inventory.num_overflows,
            num_dropped_handoffs=self._handoffs.num_dropped,
            num_superseded=self._num_superseded,
        )

    def start(self) -> None:
        """Begins to register. Returns at once, whether Redis is there or not."""
        assert not self._tasks, "already started"
        self._beat_now.set()
        self._tasks = [
            asyncio.create_task(keep_doing("heartbeat", self._beat, self._lost), name="ledger-heartbeat"),
            asyncio.create_task(self._inventory.run(), name="ledger-inventory"),
        ]
        self._handoffs.start()

    def publish(self, changes: Iterable[CacheChange]) -> None:
        """The prefix cache changed so, in this order. When too many wait, the whole inventory is sent instead."""
        self._inventory.publish(changes)

    def advance(self, record: HandoffRecord) -> None:
        """A hand-off of this worker came this far."""
        self._handoffs.advance(record)

    def drain(self) -> None:
        """Says with the next heartbeat, which is now, that no new work is wanted."""
        self._record = replace(self._record, draining=True)
        self._beat_now.set()

    async def settled(self) -> None:
        """Waits until the ledger has every inventory change published so far; for ever, if Redis stays away."""
        await self._inventory.settled()

    async def close(self) -> None:
        """Takes the worker off the ledger, if that is quickly done; else its TTL does. May be called twice."""
        tasks, self._tasks = self._tasks, []
        if not tasks:
            return
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await self._handoffs.close()
        with contextlib.suppress(LedgerAway, TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await self._ledger.deregister(self._record.worker, self._record.epoch)

    async def _beat(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._heartbeat_s):
                await self._beat_now.wait()
        confirmed_before = self._inventory.sequence
        self._beat_now.set()  # a heartbeat that fails is tried again after the backoff, not after a whole interval
        record = replace(self._record, load=self._load())
        # Only the first one may take the name from another incarnation: the older one must not win it back by beating.
        write = self._ledger.heartbeat if self._has_registered else self._ledger.register
        answer = await write(record)
        if record.draining == self._record.draining:
            self._beat_now.clear()
        self._has_registered = True
        self._is_connected = True
        if not answer.accepted:
            self._superseded()
            return
        if self._nonce not in (None, answer.nonce):
            log.warning("Redis was emptied; writing this worker's part of the ledger again")
            self._inventory.replay()
        self._nonce = answer.nonce
        self._inventory.registered(answer.sequence, confirmed_before)

    def _superseded(self) -> None:
        if self._num_superseded == 0:
            log.error("worker id %s belongs to a newer process; this one is not on the ledger", self._record.worker)
        self._num_superseded += 1

    def _lost(self, why: str) -> None:
        self._is_connected = False
