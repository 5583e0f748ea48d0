"""Redis dies, freezes, is full, or was never there: nobody waits for it, and afterwards the ledger is whole again."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis

from kvtransfer.ledger.audit import LedgerAudit
from kvtransfer.ledger.publisher import WorkerPublisher
from kvtransfer.ledger.records import LedgerAway, WorkerRecord
from kvtransfer.ledger.redis import RedisLedger
from kvtransfer.ledger.replies import Heartbeat
from proto.control import Load
from proto.ids import Epoch, WorkerId
from proto.inventory import Evicted, Stored
from proto.lifecycle import Stage
from tandem.local_redis import LocalRedis
from tests.support.ledger import FakeCache, block, blocks, handoff, until, watching, worker_record
from tests.support.redis import clear_disk, exhaust_memory, fill_disk, free_port, give_memory

W, E1 = WorkerId("d0"), Epoch("e1")
Change = Callable[[LocalRedis], Awaitable[None]]


def publisher_of(ledger: RedisLedger, cache: FakeCache, name: str = "d0", epoch: str = "e1") -> WorkerPublisher:
    record = worker_record(name, epoch)
    return WorkerPublisher(ledger, record, load=Load, snapshot=cache.snapshot, heartbeat_s=0.05)


@asynccontextmanager
async def black_hole() -> AsyncIterator[str]:
    """The URL of something that accepts connections, reads, and never says a word."""
    connections = set()

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(writer)
        try:
            while await reader.read(65536):
                pass
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.close()
        for writer in connections:
            writer.close()
            async with asyncio.timeout(10):
                await asyncio.gather(writer.wait_closed(), return_exceptions=True)


@pytest.mark.parametrize("on_port", [False, True])
async def test_after_a_crash_of_redis_everything_is_there_again(on_port: bool) -> None:
    redis = LocalRedis(port=free_port() if on_port else None)
    await redis.start()
    caches = {"e1": FakeCache(), "f1": FakeCache()}
    caches["f1"].change(Stored(blocks(50)))
    async with RedisLedger(redis.url, "test") as ledger, watching(ledger) as believer:
        d0 = publisher_of(ledger, caches["e1"])
        d1 = publisher_of(ledger, caches["f1"], "d1", "f1")
        for publisher in (d0, d1):
            publisher.start()
        d0.publish(caches["e1"].change(Stored(blocks(1, 2, 3))))
        await believer.until(lambda: believer.holds("e1", blocks(1, 2, 3)) and believer.holds("f1", blocks(50)))

        await redis.kill()
        await until(lambda: not (d0.is_connected or d1.is_connected or believer.watcher.is_connected))
        d0.publish(caches["e1"].change(Evicted(blocks(2)), Stored(blocks(4))))
        d0.advance(handoff("r", 1, Stage.SEALED))
        assert set(believer.workers) == {"d0", "d1"}
        assert believer.holds("e1", blocks(1, 2, 3))

        await redis.start()
        await believer.until(lambda: believer.holds("e1", blocks(1, 3, 4)))
        await until(lambda: d0.is_connected and d1.is_connected and believer.watcher.is_connected)
        for publisher in (d0, d1):
            await publisher.settled()
        for epoch, cache in caches.items():
            snapshot = await ledger.snapshot(Epoch(epoch))
            assert snapshot is not None
            assert snapshot.hashes == cache.blocks
        assert set(believer.workers) == {"d0", "d1"}
        assert ["d0", "d1"] in believer.history
        assert [] not in believer.history
        async with LedgerAudit(redis.url, "test") as audit:
            await audit.check()
        for publisher in (d0, d1):
            await publisher.close()
        assert await ledger.open_handoffs() == [handoff("r", 1, Stage.SEALED)]
    await redis.stop()


async def test_a_flush_is_made_good_without_any_new_change(local_redis: LocalRedis, ledger: RedisLedger) -> None:
    cache = FakeCache()
    cache.change(Stored(tuple(block(number) for number in range(5000))))
    publisher = publisher_of(ledger, cache)
    publisher.start()
    async with watching(ledger) as believer:
        await believer.until(lambda: believer.holds("e1", cache.blocks))
        await ledger._redis.flushall()
        await believer.until(lambda: believer.num_snapshots == 2)
        assert believer.holds("e1", cache.blocks)
        assert publisher.counts.num_replays == 2
        async with LedgerAudit(local_redis.url, "test") as audit:
            await audit.check()
    await publisher.close()


async def test_a_frozen_redis_holds_nobody_up_and_is_caught_up_with(local_redis: LocalRedis) -> None:
    assert local_redis.pid is not None
    cache = FakeCache()
    async with RedisLedger(local_redis.url, "test", timeout_s=0.2) as ledger, watching(ledger) as believer:
        publisher = publisher_of(ledger, cache)
        publisher.start()
        publisher.publish(cache.change(Stored(blocks(1))))
        await believer.until(lambda: believer.holds("e1", blocks(1)))
        os.kill(local_redis.pid, signal.SIGSTOP)
        try:
            for number in range(2, 500):
                publisher.publish(cache.change(Stored(blocks(number))))
                publisher.advance(handoff(f"r{number}", 1, Stage.ROUTED))
            await until(lambda: not (publisher.is_connected or believer.watcher.is_connected))
            assert believer.holds("e1", blocks(1))
        finally:
            os.kill(local_redis.pid, signal.SIGCONT)
        await believer.until(lambda: believer.holds("e1", cache.blocks))
        await publisher.settled()
        async with LedgerAudit(local_redis.url, "test") as audit:
            await audit.check()
        await publisher.close()
        assert len(await ledger.open_handoffs()) == 498


NEEDS_PRLIMIT = pytest.mark.skipif(sys.platform != "linux", reason="a limit on another process")


@pytest.mark.parametrize(
    ("fill", "empty"),
    [
        pytest.param(exhaust_memory, give_memory, id="memory"),
        pytest.param(fill_disk, clear_disk, id="disk", marks=NEEDS_PRLIMIT),
    ],
)
async def test_a_full_redis_is_as_good_as_away(local_redis: LocalRedis, fill: Change, empty: Change) -> None:
    cache = FakeCache()
    # A record outlives the longest pause between two tries to renew it.
    async with RedisLedger(local_redis.url, "test", ttl_s=6.0) as ledger, watching(ledger) as believer:
        publisher = publisher_of(ledger, cache)
        publisher.start()
        publisher.publish(cache.change(Stored(blocks(1, 2))))
        publisher.advance(handoff("r", 1, Stage.SEALED))
        await believer.until(lambda: believer.holds("e1", blocks(1, 2)))

        await fill(local_redis)
        await until(lambda: not (publisher.is_connected or believer.watcher.is_connected))
        publisher.publish(cache.change(Evicted(blocks(2)), Stored(blocks(3))))
        publisher.advance(handoff("r", 1, Stage.FINISHED))
        async with asyncio.timeout(30), Redis.from_url(local_redis.url) as redis:
            while await redis.exists(ledger.keys.worker("d0")):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        with pytest.raises(LedgerAway):
            await ledger.advance(handoff("other", 1, Stage.ROUTED))
        assert believer.holds("e1", blocks(1, 2)), "nothing has been written since"
        assert set(believer.workers) == {"d0"}, "its record has expired, but only because it could not be renewed"

        await empty(local_redis)
        await believer.until(lambda: believer.holds("e1", blocks(1, 3)))
        await publisher.settled()
        assert [] not in believer.history
        async with LedgerAudit(local_redis.url, "test") as audit:
            await audit.check()
        await publisher.close()
        assert await ledger.open_handoffs() == []


async def test_a_worker_short_of_memory_says_so_once_and_beats_again(
    ledger: RedisLedger, caplog: pytest.LogCaptureFixture
) -> None:
    refusals: list[int] = []

    async def no_memory(record: WorkerRecord) -> Heartbeat:
        refusals.append(1)
        raise MemoryError

    right, ledger.register = ledger.register, no_memory  # type: ignore[method-assign]
    publisher = publisher_of(ledger, FakeCache())
    publisher.start()
    await until(lambda: len(refusals) >= 3)
    ledger.register = right  # type: ignore[method-assign]
    await until(lambda: publisher.is_connected)
    await publisher.close()
    assert caplog.text.count("no memory") == 1


async def test_a_redis_that_never_answers_bounds_what_waits_and_lets_go() -> None:
    async with black_hole() as url, RedisLedger(url, "test", timeout_s=0.1) as ledger:
        with pytest.raises(LedgerAway, match="TimeoutError: no answer in time"):
            await ledger.workers()
        cache = FakeCache()
        publisher = publisher_of(ledger, cache)
        publisher.start()
        many = tuple(block(number) for number in range(10_000))
        for _ in range(20):
            publisher.publish([Stored(many)])
        for number in range(10_000):
            publisher.advance(handoff(f"r{number}", 1, Stage.ROUTED))
        counts = publisher.counts
        assert counts.num_overflows > 0
        assert counts.num_dropped_handoffs == 10_000 - 8192
        async with watching(ledger) as believer:
            assert not believer.watcher.is_connected
        await publisher.close()
        assert cache.num_snapshots == 0
        assert not publisher.is_connected


async def test_a_redis_that_comes_late_is_used_from_then_on() -> None:
    port = free_port()
    redis = LocalRedis(port=port)
    cache = FakeCache()
    cache.change(Stored(blocks(1)))
    async with RedisLedger(redis.url, "test") as ledger, watching(ledger) as believer:
        publisher = publisher_of(ledger, cache)
        publisher.start()
        publisher.publish(cache.change(Stored(blocks(2))))
        assert not believer.watcher.is_connected
        assert believer.watcher.trouble == "it has not been read yet"
        await until(lambda: f"connecting to 127.0.0.1:{port}" in believer.watcher.trouble)
        async with redis:
            await believer.until(lambda: believer.holds("e1", blocks(1, 2)))
            await publisher.close()


async def test_an_outage_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async with RedisLedger("unix:///nonexistent/redis.sock", "test") as ledger:
        heard: list[str] = []
        publisher = publisher_of(ledger, FakeCache())
        publisher._lost = heard.append  # type: ignore[method-assign]
        publisher.start()
        await until(lambda: len(heard) >= 3)
        await publisher.close()
    assert caplog.text.count("heartbeat: the ledger is away") == 1
    assert set(heard) == {"ConnectionError: Error 2 connecting to /nonexistent/redis.sock. No such file or directory."}
