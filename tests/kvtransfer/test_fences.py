"""Tries, tombstones and refusals."""

from __future__ import annotations

import pytest

from kvtransfer.fences import FenceTable, Refusals, Refused, why_refused
from proto.errors import StaleMessage
from proto.ids import Epoch, Generation, RequestId
from tests.support.handoff import make_fence

R = RequestId("r.1")


def never(highest: Generation) -> None:
    raise AssertionError("superseded")


@pytest.fixture
def table() -> FenceTable:
    return FenceTable(Epoch("d"), 100.0)


def test_a_first_try_is_admitted(table: FenceTable) -> None:
    table.open(make_fence(3), 0.0, never)
    assert table.highest(R) == 3
    assert table.refusals.total == 0


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_a_try_that_is_not_newer_is_refused(table: FenceTable, generation: int) -> None:
    table.open(make_fence(3), 0.0, never)
    with pytest.raises(StaleMessage) as refused:
        table.open(make_fence(generation), 0.0, never)
    assert refused.value.highest == 3
    assert table.refusals[Refused.STALE_GENERATION] == 1


def test_a_newer_try_ends_the_older(table: FenceTable) -> None:
    told: list[int] = []
    table.open(make_fence(1), 0.0, told.append)
    table.open(make_fence(4), 0.0, never)
    assert told == [4]
    table.close(make_fence(1), 1.0)  # the older one's end says nothing of the newer
    assert table.highest(R) == 4
    with pytest.raises(StaleMessage):
        table.open(make_fence(4), 1.0, never)


def test_another_incarnation_is_not_us(table: FenceTable) -> None:
    with pytest.raises(StaleMessage):
        table.open(make_fence(1, decode="d before the restart"), 0.0, never)
    assert table.refusals[Refused.FOREIGN_EPOCH] == 1
    assert table.num_known == 0


def test_a_tombstone_bars_duplicates_until_its_time_is_over(table: FenceTable) -> None:
    table.open(make_fence(2), 0.0, never)
    table.close(make_fence(2), 10.0)
    table.close(make_fence(2), 20.0)
    with pytest.raises(StaleMessage):
        table.open(make_fence(2), 119.0, never)
    table.open(make_fence(2), 120.0, never)


def test_a_newer_try_passes_a_tombstone(table: FenceTable) -> None:
    table.open(make_fence(1), 0.0, never)
    table.close(make_fence(1), 0.0)
    table.open(make_fence(2), 0.0, never)
    assert table.highest(R) == 2


def test_the_routers_abort_ends_tries_and_bars_them(table: FenceTable) -> None:
    told: list[int] = []
    table.open(make_fence(2), 0.0, told.append)
    table.end(R, Generation(1), 0.0)  # an older one
    assert told == []
    table.end(R, Generation(2), 0.0)
    table.end(R, Generation(2), 0.0)
    assert told == [2]
    with pytest.raises(StaleMessage):
        table.open(make_fence(2), 1.0, never)
    table.open(make_fence(3), 1.0, never)


def test_an_abort_may_come_before_the_offer(table: FenceTable) -> None:
    table.end(R, Generation(1), 0.0)
    with pytest.raises(StaleMessage):
        table.open(make_fence(1), 1.0, never)


def test_memory_is_bounded_by_time(table: FenceTable) -> None:
    for number in range(1000):
        fence = make_fence(request=f"r.{number}")
        table.open(fence, float(number), never)
        table.close(fence, float(number))
        assert table.num_known <= 101


def test_why() -> None:
    ours = make_fence(3, decode="new d")
    assert why_refused(make_fence(3, request="r.2", decode="new d"), ours) is Refused.UNKNOWN
    assert why_refused(make_fence(2, decode="d"), ours) is Refused.STALE_GENERATION
    assert why_refused(make_fence(2, decode="new d"), ours) is Refused.STALE_GENERATION
    assert why_refused(make_fence(3, decode="d"), ours) is Refused.FOREIGN_EPOCH
    assert why_refused(make_fence(3, prefill="p2", decode="new d"), ours) is Refused.FOREIGN_EPOCH
    assert why_refused(make_fence(4, decode="new d"), ours) is Refused.UNKNOWN


def test_refusals_are_counted_by_reason() -> None:
    refusals = Refusals()
    refusals.add(Refused.UNKNOWN)
    refusals.add(Refused.UNKNOWN)
    refusals.add(Refused.MALFORMED)
    assert (refusals[Refused.UNKNOWN], refusals[Refused.STALE_GENERATION], refusals.total) == (2, 0, 3)
