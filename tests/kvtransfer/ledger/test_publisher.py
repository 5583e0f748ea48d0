"""A worker's pen on a real Redis: what it writes, and that it writes all of it again when it must."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from kvtransfer.ledger.audit import LedgerAudit
from kvtransfer.ledger.inventory import InventoryWriter
from kvtransfer.ledger.publisher import WorkerPublisher
from kvtransfer.ledger.records import WorkerRecord
from kvtransfer.ledger.redis import RedisLedger
from proto.control import Load
from proto.ids import BlockHash, Epoch, WorkerId
from proto.inventory import Cleared, Evicted, Stored
from proto.lifecycle import Stage
from tandem.local_redis import LocalRedis
from tests.support.ledger import FakeCache, block, blocks, handoff, until, watching, worker_record

W, E1 = WorkerId("d0"), Epoch("e1")
BEAT_S = 0.05


@asynccontextmanager
async def publishing(
    ledger: RedisLedger, cache: FakeCache, record: WorkerRecord | None = None
) -> AsyncIterator[WorkerPublisher]:
    publisher = WorkerPublisher(
        ledger, record or worker_record(), load=lambda: Load(num_running=7), snapshot=cache.snapshot, heartbeat_s=BEAT_S
    )
    publisher.start()
    try:
        yield publisher
    finally:
        await publisher.close()


@pytest_asyncio.fixture
async def audit(local_redis: LocalRedis) -> AsyncIterator[LedgerAudit]:
    async with LedgerAudit(local_redis.url, "test") as audit:
        yield audit


@pytest_asyncio.fixture
async def raw(local_redis: LocalRedis) -> AsyncIterator[Redis]:
    client = Redis.from_url(local_redis.url, protocol=2)
    yield client
    await client.aclose()


async def stored(ledger: RedisLedger, epoch: Epoch = E1) -> frozenset[BlockHash] | None:
    snapshot = await ledger.snapshot(epoch)
    return None if snapshot is None else snapshot.hashes


async def test_it_registers_with_its_load_and_inventory_and_leaves_nothing_behind(
    ledger: RedisLedger, audit: LedgerAudit
) -> None:
    cache = FakeCache()
    cache.change(Stored(blocks(1, 2)))
    async with publishing(ledger, cache) as publisher:
        await publisher.settled()
        assert publisher.is_connected
        assert await ledger.workers() == [replace(worker_record(), load=Load(num_running=7))]
        assert await stored(ledger) == set(blocks(1, 2))
        await audit.check()
    assert await ledger.workers() == []
    assert await stored(ledger) is None
    await publisher.close()


async def test_changes_follow_in_order(ledger: RedisLedger, audit: LedgerAudit) -> None:
    cache = FakeCache()
    async with publishing(ledger, cache) as publisher:
        await publisher.settled()
        publisher.publish(cache.change(Stored(blocks(1, 2)), Evicted(blocks(1)), Cleared(), Stored(blocks(3))))
        publisher.publish(cache.change(Stored(tuple(block(100 + n) for n in range(1000)))))
        publisher.publish([])
        await publisher.settled()
        assert await stored(ledger) == cache.blocks
        assert publisher.counts.num_replays == 1
        await audit.check()


async def test_handoffs_are_written_by_the_time_it_has_closed(ledger: RedisLedger) -> None:
    async with publishing(ledger, FakeCache()) as publisher:
        publisher.advance(handoff("r", 1, Stage.SEALED))
    assert await ledger.open_handoffs() == [handoff("r", 1, Stage.SEALED)]


async def test_draining_is_said_at_once(ledger: RedisLedger) -> None:
    record = worker_record()
    publisher = WorkerPublisher(ledger, record, load=Load, snapshot=FakeCache().snapshot, heartbeat_s=3600)
    publisher.start()
    await publisher.settled()
    async with watching(ledger) as believer:
        await believer.until(lambda: W in believer.workers)
        assert not believer.workers[W].draining
        publisher.drain()
        await believer.until(lambda: believer.workers[W].draining)
    await publisher.close()


async def test_too_many_waiting_changes_become_one_snapshot(ledger: RedisLedger, audit: LedgerAudit) -> None:
    cache = FakeCache()
    await ledger.register(worker_record())
    writer = InventoryWriter(ledger, W, E1, cache.snapshot, most_waiting_hashes=50)
    task = asyncio.create_task(writer.run())
    writer.registered(None, 0)
    await writer.settled()
    for number in range(200):
        writer.publish(cache.change(Stored(blocks(number))))
    assert writer.num_overflows > 0
    await writer.settled()
    assert await stored(ledger) == cache.blocks
    assert writer.num_replays == 2
    await audit.check()
    task.cancel()
    await asyncio.wait([task])


async def test_changes_made_while_the_snapshot_is_read_are_not_lost(ledger: RedisLedger, audit: LedgerAudit) -> None:
    """The snapshot may be read before or after a change that is published meanwhile: both end right."""
    cache = FakeCache()
    cache.change(Stored(blocks(1, 2)))
    reading, go_on = asyncio.Event(), asyncio.Event()

    async def slow_snapshot() -> list[BlockHash]:
        before = await cache.snapshot()
        reading.set()
        await go_on.wait()
        return before

    await ledger.register(worker_record())
    writer = InventoryWriter(ledger, W, E1, slow_snapshot)
    task = asyncio.create_task(writer.run())
    writer.publish([Stored(blocks(1, 2))])
    writer.registered(None, 0)
    await reading.wait()
    writer.publish(cache.change(Evicted(blocks(1)), Stored(blocks(3))))
    go_on.set()
    await writer.settled()
    assert await stored(ledger) == set(blocks(2, 3)) == cache.blocks
    await audit.check()
    task.cancel()
    await asyncio.wait([task])


async def test_a_snapshot_that_fails_is_tried_again(ledger: RedisLedger, caplog: pytest.LogCaptureFixture) -> None:
    cache = FakeCache()
    cache.change(Stored(blocks(5)))
    failures = iter([RuntimeError("the engine is busy dying")])

    async def fragile_snapshot() -> list[BlockHash]:
        for failure in failures:
            raise failure
        return await cache.snapshot()

    publisher = WorkerPublisher(ledger, worker_record(), load=Load, snapshot=fragile_snapshot, heartbeat_s=BEAT_S)
    publisher.start()
    await publisher.settled()
    assert await stored(ledger) == cache.blocks
    assert "cache inventory failed" in caplog.text
    await publisher.close()


async def test_the_name_goes_to_the_newer_process_and_the_older_one_stays_off(
    ledger: RedisLedger, audit: LedgerAudit, caplog: pytest.LogCaptureFixture
) -> None:
    old_cache, new_cache = FakeCache(), FakeCache()
    old_cache.change(Stored(blocks(1)))
    new_cache.change(Stored(blocks(2)))
    async with watching(ledger) as believer, publishing(ledger, old_cache, worker_record(epoch="old")) as old:
        await believer.until(lambda: believer.holds("old", blocks(1)))
        async with publishing(ledger, new_cache, worker_record(epoch="new")):
            await believer.until(lambda: believer.holds("new", blocks(2)))
            old.publish(old_cache.change(Stored(blocks(3))))
            await until(lambda: old.counts.num_superseded >= 3)
            assert set(believer.inventories) == {"new"}
            assert await stored(ledger, Epoch("old")) is None
            assert caplog.text.count("belongs to a newer process") == 1
            await audit.check()
        await believer.until(lambda: believer.holds("old", blocks(1, 3)))  # the newer one left in order
        await audit.check()


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_happens_to_redis_the_ledger_comes_to_equal_the_cache(
    local_redis: LocalRedis, ledger: RedisLedger, raw: Redis, seed: int
) -> None:
    rng = random.Random(seed)
    cache = FakeCache()
    async with watching(ledger) as believer, publishing(ledger, cache) as publisher:
        for _ in range(30):
            match rng.choice(
                ["change"] * 6 + ["flush", "forget sequence", "roll back", "forget scripts", "forget name"]
            ):
                case "change":
                    publisher.publish(cache.change(*random_changes(rng)))
                case "flush":
                    await raw.flushall()
                case "forget sequence":
                    await raw.delete("test:sequence:e1")
                case "roll back":
                    await raw.set("test:sequence:e1", 0, xx=True, keepttl=True)
                case "forget scripts":
                    await raw.script_flush()
                case "forget name":
                    await raw.delete("test:worker:d0", "test:workers")
            if rng.random() < 0.3:
                await publisher.settled()
            if rng.random() < 0.2:
                await asyncio.sleep(BEAT_S)
        publisher.publish(cache.change(Stored(blocks(999))))  # believed only once all before it is right
        await believer.until(lambda: believer.holds("e1", cache.blocks))
        await publisher.settled()
        assert await stored(ledger) == cache.blocks
        async with LedgerAudit(local_redis.url, "test") as audit:
            await audit.check()


def random_changes(rng: random.Random) -> list[Stored | Evicted | Cleared]:
    def some() -> tuple[BlockHash, ...]:
        return blocks(*rng.sample(range(30), rng.randint(1, 8)))

    kinds = rng.choices(["stored", "evicted", "cleared"], [6, 4, 1], k=rng.randint(1, 5))
    return [
        Cleared() if kind == "cleared" else Stored(some()) if kind == "stored" else Evicted(some()) for kind in kinds
    ]
