"""Records for tests of the ledger, and a worker's prefix cache in a few lines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

from kvtransfer.ledger.records import HandoffRecord, InventoryChange, Snapshot, WorkerRecord
from kvtransfer.ledger.redis import RedisLedger
from kvtransfer.ledger.watcher import LedgerWatcher
from proto.control import Load, Role
from proto.ids import BlockHash, Epoch, Generation, RequestId, WorkerId
from proto.inventory import CacheChange, Cleared, Evicted, Stored
from proto.lifecycle import Stage


def block(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(16, "big"))


def blocks(*numbers: int) -> tuple[BlockHash, ...]:
    return tuple(block(number) for number in numbers)


def worker_record(
    name: str = "d0", epoch: str = "e1", *, role: Role = Role.DECODE, draining: bool = False, num_running: int = 0
) -> WorkerRecord:
    return WorkerRecord(
        worker=WorkerId(name),
        role=role,
        epoch=Epoch(epoch),
        address="127.0.0.1:9000",
        layout="layout",
        numerics="numerics",
        model="tiny",
        model_digest="digest",
        block_size=16,
        num_blocks=100,
        load=Load(num_running=num_running, num_blocks=100),
        draining=draining,
        started_at=1.5,
    )


def handoff(request: str, generation: int, stage: Stage, *, decode: str | None = "d") -> HandoffRecord:
    return HandoffRecord(
        request=RequestId(request),
        generation=Generation(generation),
        stage=stage,
        prefill_epoch=Epoch("p"),
        decode_epoch=None if decode is None else Epoch(decode),
    )


async def until(is_so: Callable[[], bool]) -> None:
    """For what does not announce itself. Use an event where there is one."""
    async with asyncio.timeout(30):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class Inventory:
    """A set of blocks that is changed by what the ledger reports: what a router would believe."""

    def __init__(self) -> None:
        self.blocks: set[BlockHash] = set()

    def apply(self, change: InventoryChange) -> None:
        match change:
            case Stored(hashes):
                self.blocks |= set(hashes)
            case Evicted(hashes):
                self.blocks -= set(hashes)
            case Cleared():
                self.blocks.clear()
            case Snapshot(hashes):
                self.blocks = set(hashes)


class FakeCache(Inventory):
    """A worker's prefix cache: changes are applied at once, and returned to be published."""

    def __init__(self) -> None:
        super().__init__()
        self.num_snapshots = 0

    def change(self, *changes: CacheChange) -> tuple[CacheChange, ...]:
        for change in changes:
            self.apply(change)
        return changes

    async def snapshot(self) -> list[BlockHash]:
        self.num_snapshots += 1
        return sorted(self.blocks)


class Believer:
    """What a router believes from a watcher's callbacks, and a way to wait until it believes something."""

    watcher: LedgerWatcher

    def __init__(self) -> None:
        self.workers: dict[WorkerId, WorkerRecord] = {}
        self.inventories: dict[Epoch, Inventory] = {}
        self.num_snapshots = 0
        self.history: list[list[str]] = []
        self._changed = asyncio.Event()

    def workers_changed(self, workers: list[WorkerRecord]) -> None:
        self.workers = {record.worker: record for record in workers}
        self.history.append(sorted(self.workers))
        epochs = {record.epoch for record in workers}
        self.inventories = {epoch: known for epoch, known in self.inventories.items() if epoch in epochs}
        self._changed.set()

    def inventory_changed(self, epoch: Epoch, change: InventoryChange) -> None:
        assert any(record.epoch == epoch for record in self.workers.values()), "an inventory before its worker"
        self.num_snapshots += isinstance(change, Snapshot)
        self.inventories.setdefault(epoch, Inventory()).apply(change)
        self._changed.set()

    def holds(self, epoch: str, wanted: Iterable[BlockHash]) -> bool:
        inventory = self.inventories.get(Epoch(epoch))
        return inventory is not None and inventory.blocks == set(wanted)

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not is_so():
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def watching(ledger: RedisLedger, *, poll_s: float = 0.05) -> AsyncIterator[Believer]:
    believer = Believer()
    watcher = LedgerWatcher(
        ledger,
        workers_changed=believer.workers_changed,
        inventory_changed=believer.inventory_changed,
        poll_s=poll_s,
    )
    believer.watcher = watcher
    watcher.start()
    try:
        yield believer
    finally:
        await watcher.close()
