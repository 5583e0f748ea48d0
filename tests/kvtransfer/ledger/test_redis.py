"""Each operation of the ledger on a real Redis, audited after every step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from kvtransfer.ledger.audit import LedgerAudit, LedgerInconsistent
from kvtransfer.ledger.records import InventoryEvent, Joined, LedgerAway, Left, Replaced, Snapshot
from kvtransfer.ledger.redis import MOST_HASHES_PER_EVENT, RedisLedger
from kvtransfer.ledger.replies import NotRegistered, OutOfStep
from proto.errors import SettingsError
from proto.ids import Epoch, WorkerId
from proto.inventory import Cleared, Evicted, Stored
from proto.lifecycle import Stage
from proto.settings import LedgerSettings
from tandem.local_redis import LocalRedis
from tests.support.ledger import block, blocks, handoff, worker_record
from tests.support.redis import exhaust_memory, give_memory

W, E1, E2 = WorkerId("d0"), Epoch("e1"), Epoch("e2")


@pytest_asyncio.fixture
async def audit(local_redis: LocalRedis) -> AsyncIterator[LedgerAudit]:
    async with LedgerAudit(local_redis.url, "test") as audit:
        yield audit


@pytest_asyncio.fixture
async def raw(local_redis: LocalRedis) -> AsyncIterator[Redis]:
    client = Redis.from_url(local_redis.url, protocol=2)
    yield client
    await client.aclose()


async def expiries(raw: Redis) -> AsyncGenerator[bytes, None]:
    """The names of keys as they expire, from now on."""
    await raw.config_set("notify-keyspace-events", "Ex")
    listener = raw.pubsub(ignore_subscribe_messages=True)
    await listener.subscribe("__keyevent@0__:expired")

    async def names() -> AsyncGenerator[bytes, None]:
        async with listener:
            async for message in listener.listen():
                yield message["data"]

    return names()


async def test_a_registered_worker_is_seen_as_it_described_itself(ledger: RedisLedger, audit: LedgerAudit) -> None:
    first = await ledger.register(worker_record(num_running=3))
    assert (first.accepted, first.sequence) == (True, None)
    assert await ledger.workers() == [worker_record(num_running=3)]
    again = await ledger.heartbeat(worker_record(num_running=4))
    assert again == first
    assert await ledger.workers() == [worker_record(num_running=4)]
    await audit.check()


async def test_joining_and_leaving_are_announced_once(ledger: RedisLedger, audit: LedgerAudit) -> None:
    await ledger.register(worker_record())
    await ledger.register(worker_record())
    await ledger.heartbeat(worker_record())
    assert await ledger.deregister(W, E1)
    assert not await ledger.deregister(W, E1)
    events, cursor = await ledger.read_events("0-0", wait_s=0)
    assert events == [Joined(W, E1), Left(W, E1)]
    assert cursor == (await ledger.members()).tail
    assert await ledger.workers() == []
    await audit.check()


async def test_a_silent_worker_expires_with_its_inventory(
    local_redis: LocalRedis, audit: LedgerAudit, raw: Redis
) -> None:
    async with RedisLedger(local_redis.url, "test", ttl_s=0.05) as ledger:
        expired = await expiries(raw)
        await ledger.register(worker_record())
        await ledger.replace(W, E1, 1, blocks(1, 2))
        assert {await anext(expired) for _ in range(3)} == {
            b"test:worker:d0",
            b"test:sequence:e1",
            b"test:inventory:device:e1",
        }
        await expired.aclose()
        assert await ledger.workers() == []
        assert await ledger.snapshot(E1) is None
        assert await raw.hgetall("test:workers") == {}
        assert not await raw.exists("test:inventory:device:e1", "test:sequence:e1")
        with pytest.raises(NotRegistered):
            await ledger.publish(W, E1, 2, [Stored(blocks(3))])
        await audit.check()
        back = await ledger.heartbeat(worker_record())
        assert (back.accepted, back.sequence) == (True, None)
        await audit.check()


async def test_a_heartbeat_keeps_the_inventory_alive(ledger: RedisLedger, raw: Redis) -> None:
    await ledger.register(worker_record())
    await ledger.replace(W, E1, 1, blocks(1))
    for key in ("test:inventory:device:e1", "test:sequence:e1", "test:worker:d0"):
        await raw.pexpire(key, 100)
    assert (await ledger.heartbeat(worker_record())).sequence == 1
    for key in ("test:inventory:device:e1", "test:sequence:e1", "test:worker:d0"):
        assert await raw.pttl(key) > 1000


async def test_no_inventory_outlives_its_worker(local_redis: LocalRedis, audit: LedgerAudit, raw: Redis) -> None:
    names = ("test:inventory:device:e1", "test:sequence:e1", "test:worker:d0")

    async def ends() -> list[int]:
        return [await raw.pttl(name) for name in names]

    async with RedisLedger(local_redis.url, "test", ttl_s=60.0) as ledger:
        await ledger.register(worker_record())
        await raw.pexpire("test:worker:d0", 20_000)
        await ledger.replace(W, E1, 1, blocks(1))
        assert max(await ends()) <= 20_000
        await raw.pexpire("test:worker:d0", 10_000)
        await ledger.publish(W, E1, 2, [Stored(blocks(2))])
        assert max(await ends()) <= 10_000
        await raw.delete("test:worker:d0")  # as if it had expired, and nobody had tidied its name away yet
        with pytest.raises(NotRegistered):
            await ledger.publish(W, E1, 3, [Stored(blocks(3))])
        with pytest.raises(NotRegistered):
            await ledger.replace(W, E1, 3, blocks(3))
        assert (await ledger.heartbeat(worker_record())).sequence == 2
        await ledger.publish(W, E1, 3, [Stored(blocks(3))])
        await audit.check()


async def test_a_redis_without_memory_takes_no_part_of_a_write(
    local_redis: LocalRedis, ledger: RedisLedger, audit: LedgerAudit
) -> None:
    await ledger.register(worker_record())
    await ledger.replace(W, E1, 1, blocks(1, 2))
    await exhaust_memory(local_redis)
    for changes in ([Evicted(blocks(2)), Stored(blocks(3))], [Cleared()], [Evicted(blocks(1))]):
        with pytest.raises(LedgerAway, match="used memory"):
            await ledger.publish(W, E1, 2, changes)
    with pytest.raises(LedgerAway, match="used memory"):
        await ledger.replace(W, E1, 2, [])
    await give_memory(local_redis)
    assert await ledger.snapshot(E1) == Snapshot(frozenset(blocks(1, 2)), 1)
    await audit.check()


async def test_a_new_incarnation_takes_the_name_and_the_old_one_can_write_nothing(
    ledger: RedisLedger, audit: LedgerAudit, raw: Redis
) -> None:
    await ledger.register(worker_record(epoch="e1"))
    await ledger.replace(W, E1, 1, blocks(1))
    await audit.check()
    assert (await ledger.register(worker_record(epoch="e2"))).accepted
    await audit.check()
    assert await ledger.snapshot(E1) is None
    assert not (await ledger.heartbeat(worker_record(epoch="e1"))).accepted
    with pytest.raises(NotRegistered):
        await ledger.publish(W, E1, 2, [Stored(blocks(2))])
    with pytest.raises(NotRegistered):
        await ledger.replace(W, E1, 2, blocks(2))
    assert not await ledger.deregister(W, E1)
    assert [record.epoch for record in await ledger.workers()] == [E2]
    await audit.check()
    await raw.delete("test:worker:d0")  # as if e2 had expired
    assert (await ledger.heartbeat(worker_record(epoch="e1"))).accepted
    assert [record.epoch for record in await ledger.workers()] == [E1]
    await audit.check()


async def test_changes_are_applied_and_announced_in_order(ledger: RedisLedger, audit: LedgerAudit) -> None:
    await ledger.register(worker_record())
    assert await ledger.snapshot(E1) is None
    await ledger.replace(W, E1, 1, [])
    assert await ledger.snapshot(E1) == Snapshot(frozenset(), 1)
    _, start = await ledger.read_events("0-0", wait_s=0)
    assert await ledger.publish(W, E1, 2, [Stored(blocks(1, 2, 3)), Evicted(blocks(2))]) == 3
    await audit.check()
    assert await ledger.snapshot(E1) == Snapshot(frozenset(blocks(1, 3)), 3)
    assert await ledger.publish(W, E1, 4, [Cleared(), Stored(blocks(7)), Stored(())]) == 6
    await audit.check()
    assert await ledger.snapshot(E1) == Snapshot(frozenset(blocks(7)), 6)
    events, _ = await ledger.read_events(start, wait_s=0)
    changes = [Stored(blocks(1, 2, 3)), Evicted(blocks(2)), Cleared(), Stored(blocks(7)), Stored(())]
    assert events == [InventoryEvent(E1, 2 + at, change) for at, change in enumerate(changes)]


async def test_a_repeated_write_changes_nothing_and_a_gap_is_refused(ledger: RedisLedger, audit: LedgerAudit) -> None:
    await ledger.register(worker_record())
    with pytest.raises(OutOfStep):
        await ledger.publish(W, E1, 1, [Stored(blocks(1))])  # nothing to apply it to
    await ledger.replace(W, E1, 1, [])
    batch = [Stored(blocks(1)), Evicted(blocks(1)), Stored(blocks(2))]
    assert await ledger.publish(W, E1, 2, batch) == 4
    tail = (await ledger.members()).tail
    assert await ledger.publish(W, E1, 2, batch) == 4
    assert (await ledger.members()).tail == tail
    for wrong in (1, 2, 3, 6):
        with pytest.raises(OutOfStep):
            await ledger.publish(W, E1, wrong, [Stored(blocks(9))])
    assert await ledger.snapshot(E1) == Snapshot(frozenset(blocks(2)), 4)
    await audit.check()


async def test_a_large_inventory_is_replaced_at_once(ledger: RedisLedger, audit: LedgerAudit) -> None:
    await ledger.register(worker_record())
    many = [block(number) for number in range(10_000)]
    await ledger.replace(W, E1, 1, many + many[:50])
    assert await ledger.snapshot(E1) == Snapshot(frozenset(many), 1)
    await audit.check()
    await ledger.publish(W, E1, 2, [Stored(tuple(block(20_000 + n) for n in range(MOST_HASHES_PER_EVENT)))])
    await ledger.replace(W, E1, 5, many[:3])
    assert await ledger.snapshot(E1) == Snapshot(frozenset(many[:3]), 5)
    events, _ = await ledger.read_events("0-0", wait_s=0)
    assert [type(event.change) for event in events if isinstance(event, InventoryEvent)] == [Replaced, Stored, Replaced]
    await audit.check()


async def test_an_inventory_that_was_lost_on_its_way_is_not_put_in_place(ledger: RedisLedger, raw: Redis) -> None:
    await ledger.register(worker_record())
    await ledger.replace(W, E1, 1, blocks(1))
    await raw.config_set("maxmemory", 1)  # noeviction: writes are refused from here on
    with pytest.raises(LedgerAway, match="OutOfMemory"):
        await ledger.replace(W, E1, 2, blocks(2, 3))
    await raw.config_set("maxmemory", 0)
    assert await ledger.snapshot(E1) == Snapshot(frozenset(blocks(1)), 1)


async def test_the_stream_stays_bounded(local_redis: LocalRedis, audit: LedgerAudit, raw: Redis) -> None:
    async with RedisLedger(local_redis.url, "test", most_events=200) as ledger:
        await ledger.register(worker_record())
        await ledger.replace(W, E1, 1, [])
        for start in range(2, 1202, 50):
            await ledger.publish(W, E1, start, [Stored(blocks(start + at)) for at in range(50)])
        assert 200 <= await raw.xlen("test:events") < 400
        await audit.check()  # has seen none of it, so it takes what is there
        await ledger.publish(W, E1, 1202, [Evicted(blocks(2))])
        await audit.check()


async def test_two_namespaces_do_not_see_each_other(local_redis: LocalRedis, ledger: RedisLedger) -> None:
    async with RedisLedger(local_redis.url, "other") as other:
        await ledger.register(worker_record())
        await ledger.replace(W, E1, 1, blocks(1))
        await ledger.advance(handoff("r", 1, Stage.ROUTED))
        assert await other.workers() == []
        assert await other.snapshot(E1) is None
        assert await other.open_handoffs() == []
        assert (await other.read_events("0-0", wait_s=0))[0] == []
        assert (await other.members()).nonce != (await ledger.members()).nonce
        assert not await other.deregister(W, E1)
        assert len(await ledger.workers()) == 1


async def test_an_emptied_redis_shows_another_nonce(ledger: RedisLedger, raw: Redis) -> None:
    before = (await ledger.register(worker_record())).nonce
    assert (await ledger.members()).nonce == before
    await raw.flushall()
    after = (await ledger.heartbeat(worker_record())).nonce
    assert after != before
    assert (await ledger.members()).nonce == after


async def test_scripts_are_sent_again_when_redis_forgot_them(ledger: RedisLedger, raw: Redis) -> None:
    await ledger.register(worker_record())
    await raw.script_flush()
    assert (await ledger.heartbeat(worker_record())).accepted
    assert len(await ledger.workers()) == 1


async def test_malformed_records_are_skipped_and_counted(ledger: RedisLedger, raw: Redis) -> None:
    await ledger.register(worker_record())
    await raw.hset("test:workers", "bad", "e9")
    await raw.set("test:worker:bad", b"\xc1 nonsense")
    await raw.xadd("test:events", {"kind": "stored", "epoch": "e1", "sequence": "x"})
    await raw.hset("test:handoff:bad", "record", b"\x93")
    await raw.zadd("test:handoffs", {"bad": 9e15})
    assert await ledger.workers() == [worker_record()]
    assert (await ledger.read_events("0-0", wait_s=0))[0] == [Joined(W, E1)]
    assert await ledger.open_handoffs() == []
    assert ledger.counts.num_malformed == 3


async def test_a_key_of_another_type_is_an_absent_ledger_not_a_crash(ledger: RedisLedger, raw: Redis) -> None:
    await raw.set("test:workers", "not a hash")
    with pytest.raises(LedgerAway, match="WRONGTYPE"):
        await ledger.register(worker_record())
    with pytest.raises(LedgerAway, match="WRONGTYPE"):
        await ledger.members()


async def test_the_audit_finds_what_is_wrong(ledger: RedisLedger, audit: LedgerAudit, raw: Redis) -> None:
    await ledger.register(worker_record())
    await ledger.replace(W, E1, 1, blocks(1))
    await ledger.advance(handoff("r", 1, Stage.ROUTED))
    await audit.check()

    await raw.sadd("test:inventory:device:e1", block(2))
    with pytest.raises(LedgerInconsistent, match="not the blocks"):
        await audit.check()
    await raw.set("test:sequence:e1", 7, ex=60)
    with pytest.raises(LedgerInconsistent, match="at event 7"):
        await audit.check()
    await raw.set("test:sequence:e1", 1)
    with pytest.raises(LedgerInconsistent, match="for ever"):
        await audit.check()
    await raw.set("test:sequence:e1", 1, ex=60)
    await raw.set("test:sequence:e7", 1, ex=60)
    with pytest.raises(LedgerInconsistent, match="belongs to no worker"):
        await audit.check()
    await raw.delete("test:sequence:e7")
    await ledger.advance(handoff("r", 1, Stage.FINISHED))
    await raw.zadd("test:handoffs", {"r": 9e15})
    with pytest.raises(LedgerInconsistent, match="open and finished"):
        await audit.check()


async def test_nothing_listening_is_named_as_such() -> None:
    async with RedisLedger("unix:///nonexistent/redis.sock", "test") as ledger:
        with pytest.raises(LedgerAway):
            await ledger.connect()
        with pytest.raises(LedgerAway):
            await ledger.advance(handoff("r", 1, Stage.ROUTED))


async def test_connecting_warns_of_a_redis_that_evicts(
    ledger: RedisLedger, raw: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    await ledger.connect()
    assert caplog.text == ""
    await raw.config_set("maxmemory-policy", "allkeys-lru")
    await ledger.connect()
    assert "allkeys-lru" in caplog.text


async def test_a_wrong_password_is_a_wrong_setting(ledger: RedisLedger, raw: Redis, local_redis: LocalRedis) -> None:
    await raw.config_set("requirepass", "secret")
    async with RedisLedger(local_redis.url, "test") as stranger:
        with pytest.raises(SettingsError, match="password"):
            await stranger.connect()
        with pytest.raises(LedgerAway):  # whoever runs already goes on without
            await stranger.workers()
    async with RedisLedger(f"{local_redis.url}?password=secret", "test") as friend:
        await friend.connect()


async def test_what_is_said_of_an_absence_names_nobody() -> None:
    async def forbid(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """As Redis 7 does; earlier ones do not say whom."""
        while said := await reader.read(4096):
            for command in said.split(b"*")[1:]:
                is_login = b"AUTH" in command or b"SETINFO" in command
                writer.write(b"+OK\r\n" if is_login else b"-NOPERM User wal.ter may not, wal.ters may, $hush\r\n")
        writer.close()

    async with await asyncio.start_server(forbid, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        async with RedisLedger(f"redis://wal.ter:$hush@{host}:{port}", "test") as ledger:
            with pytest.raises(LedgerAway, match=r"^NoPermissionError: User \*\*\* may not, wal.ters may, \*\*\*$"):
                await ledger.connect()


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("redis://10.0.0.1:6379/0", "10.0.0.1"),
        ("rediss://:secret@redis.example", "redis.example"),
        ("redis://[fd00::1]:6379", "fd00::1"),
        ("redis://", "localhost"),
        ("unix:///run/redis.sock", None),
    ],
)
async def test_where_redis_is(url: str, host: str | None) -> None:
    async with RedisLedger(url, "test") as ledger:
        assert ledger.host == host


@pytest.mark.parametrize("namespace", ["", "a:b"])
def test_a_namespace_that_could_overlap_another_is_refused(namespace: str) -> None:
    with pytest.raises(SettingsError, match="namespace"):
        RedisLedger("redis://127.0.0.1", namespace)


def test_settings_that_name_no_redis_are_refused() -> None:
    with pytest.raises(SettingsError, match="--redis"):
        RedisLedger.from_settings(LedgerSettings())
    with pytest.raises(SettingsError, match="not a Redis URL"):
        RedisLedger.from_settings(LedgerSettings(redis="http://127.0.0.1"))


async def test_settings_make_a_ledger(local_redis: LocalRedis) -> None:
    settings = LedgerSettings(redis=local_redis.url, namespace="mine", heartbeat_ttl_s=7.0)
    async with RedisLedger.from_settings(settings) as ledger:
        await ledger.connect()
        assert (ledger.keys.namespace, ledger.ttl_s) == ("mine", 7.0)
