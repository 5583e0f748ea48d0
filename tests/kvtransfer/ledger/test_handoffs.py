"""Hand-off records only go up, whoever writes them and in whatever order; and writing them disturbs nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtransfer.ledger.audit import LedgerAudit
from kvtransfer.ledger.handoffs import HandoffWriter
from kvtransfer.ledger.records import HandoffRecord
from kvtransfer.ledger.redis import RedisLedger
from proto.ids import RequestId
from proto.lifecycle import Stage
from tandem.local_redis import LocalRedis
from tests.support.ledger import handoff

R = RequestId("r")
WRITES = st.builds(
    handoff,
    st.sampled_from(["r1", "r2"]),
    st.integers(1, 3),
    st.sampled_from(Stage),
    decode=st.sampled_from([None, "d1", "d2"]),
)
ON_REDIS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Model:
    """What the ledger should hold, in the plainest words."""

    def __init__(self) -> None:
        self.records: dict[RequestId, HandoffRecord] = {}

    def advance(self, record: HandoffRecord) -> bool:
        known = self.records.get(record.request)
        if known is None or record.order > known.order:
            self.records[record.request] = record
        return self.records[record.request] == record

    def open(self) -> set[HandoffRecord]:
        return {record for record in self.records.values() if not record.stage.is_terminal}


@pytest.fixture
def two_routers() -> Iterator[tuple[asyncio.Runner, LocalRedis]]:
    """A loop and a Redis that live for all examples of a test."""
    with asyncio.Runner() as runner:
        redis = LocalRedis()
        runner.run(redis.start())
        yield runner, redis
        runner.run(redis.stop())


@ON_REDIS
@given(writes=st.lists(st.tuples(st.integers(0, 1), WRITES), max_size=14))
def test_any_interleaving_of_two_routers_leaves_what_the_model_says(
    two_routers: tuple[asyncio.Runner, LocalRedis], writes: list[tuple[int, HandoffRecord]]
) -> None:
    runner, redis = two_routers

    async def play() -> None:
        async with RedisLedger(redis.url, "test") as first, RedisLedger(redis.url, "test") as second:
            await forget_all(first)
            model = Model()
            for router, record in writes:
                assert await (first, second)[router].advance(record) == model.advance(record)
                assert set(await first.open_handoffs()) == model.open()
            for request, record in model.records.items():
                assert await second.handoff(request) == record
            async with LedgerAudit(redis.url, "test") as audit:
                await audit.check()

    runner.run(play())


@ON_REDIS
@given(mine=st.lists(WRITES, max_size=10), theirs=st.lists(WRITES, max_size=10))
def test_routers_that_race_end_at_the_highest_write(
    two_routers: tuple[asyncio.Runner, LocalRedis], mine: list[HandoffRecord], theirs: list[HandoffRecord]
) -> None:
    runner, redis = two_routers

    async def race() -> None:
        async with RedisLedger(redis.url, "test") as first, RedisLedger(redis.url, "test") as second:
            await forget_all(first)
            held = await asyncio.gather(
                *(first.advance(record) for record in mine), *(second.advance(record) for record in theirs)
            )
            for request in {record.request for record in mine + theirs}:
                stored = await first.handoff(request)
                writes = [
                    (record, ok) for record, ok in zip(mine + theirs, held, strict=True) if record.request == request
                ]
                assert stored is not None
                assert stored.order == max(record.order for record, _ in writes)
                assert all(ok == (record == stored) for record, ok in writes if record.order == stored.order)
            num_refused = first.counts.num_refused + second.counts.num_refused
            assert num_refused == held.count(False)
            async with LedgerAudit(redis.url, "test") as audit:
                await audit.check()

    runner.run(race())


async def forget_all(ledger: RedisLedger) -> None:
    await ledger._redis.flushall()


async def test_a_tombstone_refuses_late_writes_but_not_the_next_generation(ledger: RedisLedger) -> None:
    for stage in (Stage.ROUTED, Stage.PREFILLING, Stage.FINISHED):
        assert await ledger.advance(handoff("r", 1, stage))
    assert await ledger.open_handoffs() == []
    assert not await ledger.advance(handoff("r", 1, Stage.ADOPTED))
    assert not await ledger.advance(handoff("r", 1, Stage.ABORTED))  # it ended already, and otherwise
    assert await ledger.advance(handoff("r", 1, Stage.FINISHED))  # exactly this was said before
    assert ledger.counts.num_refused == 2
    assert await ledger.open_handoffs() == []
    assert await ledger.advance(handoff("r", 2, Stage.ROUTED))
    assert await ledger.open_handoffs() == [handoff("r", 2, Stage.ROUTED)]


async def test_two_decode_workers_cannot_both_have_reached_a_stage(ledger: RedisLedger) -> None:
    assert await ledger.advance(handoff("r", 1, Stage.ADOPTED, decode="d1"))
    assert not await ledger.advance(handoff("r", 1, Stage.ADOPTED, decode="d2"))
    assert await ledger.handoff(R) == handoff("r", 1, Stage.ADOPTED, decode="d1")


async def test_a_handoff_nobody_advances_expires(local_redis: LocalRedis) -> None:
    async with RedisLedger(local_redis.url, "test", handoff_ttl_s=0.001, tombstone_ttl_s=0.001) as brief:
        await brief.advance(handoff("r", 2, Stage.DECODING))
        await brief.advance(handoff("s", 1, Stage.FAILED))
        async with asyncio.timeout(30):
            while await brief.handoff(R) or await brief.handoff(RequestId("s")):  # noqa: ASYNC110 - TTLs are silent
                await asyncio.sleep(0.001)
        assert await brief.open_handoffs() == []
    async with RedisLedger(local_redis.url, "test") as ledger, LedgerAudit(local_redis.url, "test") as audit:
        assert await ledger.advance(handoff("r", 1, Stage.ROUTED))
        assert await ledger.advance(handoff("s", 1, Stage.ROUTED))
        await audit.check()
        assert {record.request for record in await ledger.open_handoffs()} == {"r", "s"}


async def test_a_batch_is_judged_in_its_order(ledger: RedisLedger) -> None:
    batch = [
        handoff("a", 1, Stage.SEALED),
        handoff("a", 1, Stage.ROUTED),
        handoff("b", 1, Stage.FAILED),
        handoff("a", 2, Stage.ROUTED),
    ]
    assert await ledger.advance_all(batch) == [True, False, True, True]
    assert await ledger.advance_all([]) == []
    assert await ledger.open_handoffs() == [handoff("a", 2, Stage.ROUTED)]


async def test_the_writer_writes_only_the_furthest_stage(ledger: RedisLedger) -> None:
    writer = HandoffWriter(ledger)
    for stage in (Stage.ROUTED, Stage.SEALED, Stage.PREFILLING):
        writer.advance(handoff("r", 1, stage))
    assert writer.num_waiting == 1
    writer.start()
    await writer.close()
    await writer.close()
    assert await ledger.handoff(R) == handoff("r", 1, Stage.SEALED)
    assert ledger.counts.num_refused == 0


async def test_the_writer_writes_many_without_being_waited_for(ledger: RedisLedger) -> None:
    writer = HandoffWriter(ledger)
    writer.start()
    for number in range(1000):
        writer.advance(handoff(f"r{number}", 1, Stage.ROUTED))
    await writer.close()
    assert writer.num_waiting == 0
    assert len(await ledger.open_handoffs()) == 1000


async def test_the_writer_forgets_the_oldest_when_too_many_wait() -> None:
    async with RedisLedger("unix:///nonexistent/redis.sock", "test") as ledger:
        writer = HandoffWriter(ledger, most_waiting=10)
        writer.start()
        for number in range(25):
            writer.advance(handoff(f"r{number}", 1, Stage.ROUTED))
        assert (writer.num_waiting, writer.num_dropped) == (10, 15)
        await writer.close()
        assert writer.num_waiting == 10
