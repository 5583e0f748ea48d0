"""A router's eye: what it believes equals the ledger, whatever it missed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from kvtransfer.ledger.records import InventoryChange, Snapshot
from kvtransfer.ledger.redis import RedisLedger
from kvtransfer.ledger.watcher import LedgerWatcher
from proto.control import Role
from proto.ids import Epoch, WorkerId
from proto.inventory import Cleared, Evicted, Stored
from tandem.local_redis import LocalRedis
from tests.support.ledger import Believer, block, blocks, until, watching, worker_record

W, E1, E2 = WorkerId("d0"), Epoch("e1"), Epoch("e2")
NEVER_S = 3600.0


@pytest_asyncio.fixture
async def raw(local_redis: LocalRedis) -> AsyncIterator[Redis]:
    client = Redis.from_url(local_redis.url, protocol=2)
    yield client
    await client.aclose()


async def registered(ledger: RedisLedger, *numbers: int, name: str = "d0", epoch: str = "e1") -> None:
    await ledger.register(worker_record(name, epoch))
    await ledger.replace(WorkerId(name), Epoch(epoch), 1, blocks(*numbers))


async def test_it_finds_who_is_there_already(ledger: RedisLedger) -> None:
    await registered(ledger, 1, 2)
    await registered(ledger, 3, name="d1", epoch="f1")
    await ledger.register(worker_record("p0", "g1", role=Role.PREFILL))
    async with watching(ledger) as believer:
        await believer.watcher.synced()
        assert believer.watcher.is_connected
        assert set(believer.workers) == {"d0", "d1", "p0"}
        assert believer.workers == {record.worker: record for record in believer.watcher.workers}
        assert believer.holds("e1", blocks(1, 2))
        assert believer.holds("f1", blocks(3))
        assert "g1" not in believer.inventories
        assert believer.watcher.num_snapshots == 2


async def test_news_comes_by_the_stream_not_by_comparing(ledger: RedisLedger) -> None:
    async with watching(ledger, poll_s=NEVER_S) as believer:
        await believer.watcher.synced()
        assert believer.workers == {}
        await registered(ledger, 1)
        await believer.until(lambda: believer.holds("e1", blocks(1)))
        assert believer.num_snapshots == 1
        await ledger.publish(W, E1, 2, [Stored(blocks(2, 3)), Evicted(blocks(1)), Evicted(blocks(2))])
        await believer.until(lambda: believer.holds("e1", blocks(3)))
        await ledger.publish(W, E1, 5, [Cleared(), Stored(blocks(4))])
        await believer.until(lambda: believer.holds("e1", blocks(4)))
        assert believer.num_snapshots == 1
        await ledger.deregister(W, E1)
        await believer.until(lambda: believer.workers == {})
        assert believer.inventories == {}


async def test_a_change_of_load_is_told_and_no_change_is_not(ledger: RedisLedger) -> None:
    await ledger.register(worker_record(num_running=1))
    async with watching(ledger, poll_s=0.01) as believer:
        await believer.until(lambda: W in believer.workers)
        await ledger.heartbeat(worker_record(num_running=1))
        await ledger.heartbeat(worker_record(num_running=2))
        await believer.until(lambda: believer.workers[W].load.num_running == 2)
        assert len(believer.history) == 2


async def test_a_gap_in_the_numbers_leads_to_a_snapshot(ledger: RedisLedger, raw: Redis) -> None:
    await registered(ledger, 1)
    async with watching(ledger, poll_s=NEVER_S) as believer:
        await believer.until(lambda: believer.holds("e1", blocks(1)))
        # Events 2 and 3 were trimmed before anybody read them.
        await raw.sadd("test:inventory:device:e1", block(2), block(3))
        await raw.set("test:sequence:e1", 3, ex=60)
        await ledger.publish(W, E1, 4, [Stored(blocks(4))])
        await believer.until(lambda: believer.holds("e1", blocks(1, 2, 3, 4)))
        assert believer.num_snapshots == 2
        await ledger.publish(W, E1, 5, [Stored(blocks(5))])
        await believer.until(lambda: believer.holds("e1", blocks(1, 2, 3, 4, 5)))
        assert believer.num_snapshots == 2


async def test_a_gap_that_nothing_follows_is_found_by_comparing(ledger: RedisLedger, raw: Redis) -> None:
    await registered(ledger, 1)
    async with watching(ledger) as believer:
        await believer.until(lambda: believer.holds("e1", blocks(1)))
        await raw.sadd("test:inventory:device:e1", block(2))
        await raw.set("test:sequence:e1", 2, ex=60)
        await believer.until(lambda: believer.holds("e1", blocks(1, 2)))


async def test_events_that_a_snapshot_covers_are_not_told_again(ledger: RedisLedger) -> None:
    """The watcher starts at the stream's end, then more is written before its snapshot: it must skip those events."""
    told: list[InventoryChange] = []
    taking, go_on = asyncio.Event(), asyncio.Event()

    class SlowSnapshots(RedisLedger):
        async def snapshot(self, epoch: Epoch) -> Snapshot | None:
            taking.set()
            await go_on.wait()
            return await super().snapshot(epoch)

    await registered(ledger, 1)
    async with SlowSnapshots("unix:///nonexistent", "test") as slow:
        slow._redis = ledger._redis
        watcher = LedgerWatcher(
            slow,
            workers_changed=lambda workers: None,
            inventory_changed=lambda epoch, change: told.append(change),
            poll_s=NEVER_S,
        )
        watcher.start()
        await taking.wait()
        await ledger.publish(W, E1, 2, [Evicted(blocks(1)), Stored(blocks(2))])
        go_on.set()
        await watcher.synced()
        await ledger.publish(W, E1, 4, [Stored(blocks(3))])
        await until(lambda: len(told) == 2)
        await watcher.close()
    assert told == [Snapshot(frozenset(blocks(2)), 3), Stored(blocks(3))]


async def test_a_new_incarnation_replaces_the_old_with_its_inventory(ledger: RedisLedger) -> None:
    await registered(ledger, 1, 2)
    async with watching(ledger, poll_s=NEVER_S) as believer:
        await believer.until(lambda: believer.holds("e1", blocks(1, 2)))
        await registered(ledger, 7, epoch="e2")
        await believer.until(lambda: believer.holds("e2", blocks(7)))
        assert [record.epoch for record in believer.workers.values()] == [E2]
        assert set(believer.inventories) == {"e2"}
        await ledger.deregister(W, E1)  # the old one says goodbye late
        await ledger.publish(W, E2, 2, [Stored(blocks(8))])
        await believer.until(lambda: believer.holds("e2", blocks(7, 8)))
        assert W in believer.workers


async def test_an_expired_worker_is_gone_once_it_had_time_to_come_back(
    local_redis: LocalRedis, ledger: RedisLedger, raw: Redis
) -> None:
    await registered(ledger, 1)
    await registered(ledger, 2, name="d1", epoch="f1")
    async with RedisLedger(local_redis.url, "test", ttl_s=0.2) as impatient, watching(impatient) as believer:
        await believer.until(lambda: set(believer.workers) == {"d0", "d1"})
        await raw.delete("test:worker:d0", "test:sequence:e1", "test:inventory:device:e1")  # what expiry does
        await believer.until(lambda: set(believer.workers) == {"d1"})
        assert set(believer.inventories) == {"f1"}


async def test_an_emptied_redis_ejects_nobody_who_comes_back(ledger: RedisLedger, raw: Redis) -> None:
    await registered(ledger, 1)
    await registered(ledger, 2, name="d1", epoch="f1")
    async with watching(ledger, poll_s=0.01) as believer:
        await believer.until(lambda: believer.holds("e1", blocks(1)) and believer.holds("f1", blocks(2)))
        await raw.flushall()
        await ledger.heartbeat(worker_record())
        await ledger.replace(W, E1, 2, blocks(1, 5))
        await believer.until(lambda: believer.holds("e1", blocks(1, 5)))
        assert believer.watcher.num_resets == 1
        assert set(believer.workers) == {"d0", "d1"}
        assert believer.holds("f1", blocks(2))
        assert all(len(names) == 2 for names in believer.history[believer.history.index(["d0", "d1"]) :])


async def test_garbage_in_the_stream_is_passed_over(ledger: RedisLedger, raw: Redis) -> None:
    await registered(ledger, 1)
    async with watching(ledger, poll_s=NEVER_S) as believer:
        await believer.until(lambda: believer.holds("e1", blocks(1)))
        await raw.xadd("test:events", {b"kind": b"\xff\xff"})
        await raw.xadd("test:events", {b"kind": b"stored", b"epoch": b"e1", b"sequence": b"2", b"tier": b"device"})
        await raw.xadd("test:events", {b"something": b"else"})
        await ledger.publish(W, E1, 2, [Stored(blocks(2))])
        await believer.until(lambda: believer.holds("e1", blocks(1, 2)))
    assert ledger.counts.num_malformed == 3


async def test_events_of_strangers_are_passed_over(ledger: RedisLedger, raw: Redis) -> None:
    await registered(ledger, 1)
    async with watching(ledger, poll_s=NEVER_S) as believer:
        await believer.until(lambda: believer.holds("e1", blocks(1)))
        stray = {"kind": "stored", "epoch": "e7", "sequence": "1", "tier": "device", "hashes": block(9)}
        await raw.xadd("test:events", stray)  # type: ignore[arg-type]
        await raw.xadd("test:events", {"kind": "left", "worker": "d7", "epoch": "e7"})
        await raw.xadd("test:events", {"kind": "left", "worker": "d0", "epoch": "e0"})
        await ledger.publish(W, E1, 2, [Stored(blocks(2))])
        await believer.until(lambda: believer.holds("e1", blocks(1, 2)))
        assert set(believer.inventories) == {"e1"}


async def test_a_callback_that_fails_does_not_end_the_watch(
    ledger: RedisLedger, caplog: pytest.LogCaptureFixture
) -> None:
    believer = Believer()
    failures = iter([RuntimeError("a router's bug")])

    def fragile(epoch: Epoch, change: InventoryChange) -> None:
        believer.inventory_changed(epoch, change)
        for failure in failures:
            raise failure

    await registered(ledger, 1)
    watcher = LedgerWatcher(ledger, workers_changed=believer.workers_changed, inventory_changed=fragile, poll_s=NEVER_S)
    watcher.start()
    await watcher.synced()
    await ledger.publish(W, E1, 2, [Stored(blocks(2))])
    await believer.until(lambda: believer.holds("e1", blocks(1, 2)))
    assert "a router's bug" in caplog.text
    await watcher.close()
    await watcher.close()


async def test_many_events_are_read_in_parts_and_in_order(ledger: RedisLedger) -> None:
    await registered(ledger)
    async with watching(ledger, poll_s=0.01) as believer:
        await believer.until(lambda: believer.holds("e1", ()))
        sequence = 2
        for start in range(0, 2000, 40):
            changes = [Stored(blocks(start + at)) for at in range(40)] + [Evicted(blocks(start))]
            sequence = 1 + await ledger.publish(W, E1, sequence, changes)
        await believer.until(lambda: believer.holds("e1", blocks(*(n for n in range(2000) if n % 40))))
        assert believer.num_snapshots == 1
