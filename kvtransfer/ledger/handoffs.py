"""Writes hand-offs' progress behind the back of whoever makes it. Knows queues; knows nothing of what a stage means."""

from __future__ import annotations

import asyncio
import contextlib
import itertools

from kvtransfer.ledger.records import HandoffRecord, LedgerAway
from kvtransfer.ledger.redis import RedisLedger
from kvtransfer.ledger.retry import keep_doing
from proto.ids import RequestId

_BATCH = 256
_MOST_WAITING = 8192
_LAST_WORDS_S = 1.0


class HandoffWriter:
    """A bounded, merging queue in front of ``RedisLedger.advance``. Call its methods from the event loop's thread.

    Of one request only the furthest stage waits: writes only go up, so the ones below it need not be made. When too
    many requests wait, the oldest is forgotten; a record that is missing in the ledger harms nobody.
    """

    def __init__(self, ledger: RedisLedger, *, most_waiting: int = _MOST_WAITING) -> None:
        self._ledger = ledger
        self._most_waiting = most_waiting
        self._waiting: dict[RequestId, HandoffRecord] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._num_dropped = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_dropped(self) -> int:
        return self._num_dropped

    def start(self) -> None:
        assert self._task is None, "already started"
        self._task = asyncio.create_task(keep_doing("hand-off records", self._step), name="ledger-handoffs")

    def advance(self, record: HandoffRecord) -> None:
        """Returns at once, and never raises. Before ``start`` and after ``close`` it only queues."""
        waiting = self._waiting.get(record.request)
        if waiting is not None and waiting.order >= record.order:
            return
        self._waiting[record.request] = record
        if len(self._waiting) > self._most_waiting:
            del self._waiting[next(iter(self._waiting))]
            self._num_dropped += 1
        self._wake.set()

    async def close(self) -> None:
        """Stops, after one short try to write what waits. May be called twice."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait([task])
        with contextlib.suppress(LedgerAway, TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await self._write_waiting()

    async def _step(self) -> None:
        await self._wake.wait()
        await self._write_waiting()
        if not self._waiting:
            self._wake.clear()

    async def _write_waiting(self) -> None:
        while self._waiting:
            batch = list(itertools.islice(self._waiting.values(), _BATCH))
            await self._ledger.advance_all(batch)
            for record in batch:
                # Only what was written: a further stage may have come meanwhile.
                if self._waiting.get(record.request) == record:
                    del self._waiting[record.request]
