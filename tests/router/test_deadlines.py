"""No stage lasts for ever: who is silent for too long is lost to the request, and outlawed."""

from __future__ import annotations

import pytest

from proto.control import Abort, Prefill, RejectReason, Role
from proto.errors import TandemError, WorkerLost
from proto.ids import Generation
from proto.lifecycle import Stage
from router.deadlines import StageLimits, Watch
from router.recovery import Remedy
from tests.support.fleet import FakeTimers, House, read_all, token

LIMITS = StageLimits(queued_s=100.0, prefill_s=50.0, transfer_s=20.0, silence_s=30.0)


def house(*names: str, **rules: float) -> House:
    return House(*names, limits=LIMITS, **rules)


@pytest.mark.parametrize(
    ("stage", "is_computed", "has_decode", "seconds"),
    [
        (Stage.ROUTED, False, False, 100.0),
        (Stage.QUEUED, False, False, 100.0),
        (Stage.PREFILLING, False, False, 50.0),
        (Stage.STREAMING, False, False, 50.0),
        (Stage.STREAMING, True, False, 20.0),
        (Stage.SEALED, True, False, 20.0),
        (Stage.ADOPTED, True, True, 30.0),
        (Stage.DECODING, True, True, 30.0),
    ],
)
def test_each_stage_has_its_limit(stage: Stage, is_computed: bool, has_decode: bool, seconds: float) -> None:
    assert LIMITS.of(stage, is_computed=is_computed, has_decode=has_decode) == seconds


def test_a_watch_costs_one_timer_however_often_it_is_heard() -> None:
    timers, calls = FakeTimers(), []
    watch = Watch(timers, lambda: calls.append(timers.now))
    for _ in range(100):
        watch.allow(10.0)
        timers.advance(1.0)
        assert timers.num_live == 1
    timers.advance(8.9)
    assert not calls
    timers.advance(1.0)
    assert calls == [209.0]
    assert timers.num_live == 0


def test_a_shorter_limit_counts_at_once() -> None:
    timers, calls = FakeTimers(), []
    watch = Watch(timers, lambda: calls.append(timers.now))
    watch.allow(100.0)
    watch.allow(5.0)
    timers.advance(5.0)
    assert calls == [105.0]
    watch.allow(5.0)
    watch.cancel()
    watch.cancel()
    timers.advance(1000.0)
    assert calls == [105.0]


async def test_a_prefill_worker_that_never_begins_is_replaced() -> None:
    place = house("p1", "p2", "d1")
    stream = await place.start()
    first, _ = place.last_prefill()
    place.timers.advance(99.0)
    assert place.heard.remedies == []
    place.timers.advance(2.0)
    second, prefill = place.last_prefill()
    assert (second != first, prefill.generation) == (True, 2)
    assert Abort(stream.id, Generation(1)) in place.aborts_to(first)
    assert place.fleet.faults == [first]
    place.says(first, token(stream.id, 0, value=5), generation=1)  # it wakes up: nobody listens
    place.says(second, token(stream.id, 0, last=True))
    assert await read_all(stream) == [token(stream.id, 0, last=True)]
    assert place.heard.refusals == ["stale"]


async def test_progress_restarts_the_clock() -> None:
    place = house("p1", "p2", "d1")
    stream = await place.start()
    first, _ = place.last_prefill()
    place.timers.advance(90.0)
    place.reports(first, stream.id, Stage.PREFILLING)
    place.timers.advance(45.0)
    place.reports(first, stream.id, Stage.STREAMING)
    place.timers.advance(45.0)
    assert place.heard.remedies == []
    place.timers.advance(6.0)
    assert place.heard.remedies == [Remedy.RESTART]
    await stream.aclose()


async def test_a_hand_off_that_hangs_goes_to_another_decode_worker() -> None:
    place = house("p1", "d1", "d2")
    stream = await place.start()
    first, _ = place.last_attach()
    place.reports("p1", stream.id, Stage.STREAMING)
    place.says("p1", token(stream.id, 0))
    place.timers.advance(21.0)
    second, _ = place.last_attach()
    assert second != first
    assert place.last_redirect()[1].decode.worker == second
    assert len([m for m in place.sent_to("p1") if isinstance(m, Prefill)]) == 1
    assert (place.fleet.faults, place.aborts_to(first)) == ([first], [Abort(stream.id, Generation(1))])
    place.says(second, token(stream.id, 1, last=True))
    assert [out.position for out in await read_all(stream)] == [0, 1]


async def test_a_decode_worker_that_falls_silent_is_replaced_by_a_resume() -> None:
    place = house("p1", "d1", "d2")
    stream = await place.start()
    first, _ = place.last_attach()
    place.says("p1", token(stream.id, 0))
    for position in range(1, 5):
        place.says(first, token(stream.id, position))
        place.timers.advance(29.0)
    assert place.heard.remedies == []
    place.timers.advance(2.0)
    second, attach = place.last_attach()
    assert (second != first, attach.request.forced) == (True, ((0, 1, 2, 3, 4),))
    place.says(first, token(stream.id, 5, value=9), generation=1)
    place.says(second, token(stream.id, 5, last=True))
    assert [out.token for out in await read_all(stream)] == list(range(6))


async def test_a_local_prompt_has_the_same_limits() -> None:
    place = house("d1", "d2")
    stream = await place.start()
    first, _ = place.last_attach()
    place.reports(first, stream.id, Stage.QUEUED)
    place.timers.advance(60.0)
    place.reports(first, stream.id, Stage.PREFILLING)
    place.timers.advance(49.0)
    assert place.heard.remedies == []
    place.timers.advance(2.0)
    assert place.heard.remedies == [Remedy.RESTART]
    await stream.aclose()


async def test_nothing_is_expected_while_a_request_waits_for_a_worker() -> None:
    place = house("p1", "d1", patience_s=1000.0)
    stream = await place.start()
    place.says("p1", token(stream.id, 0))
    place.kill("d1")
    place.timers.advance(500.0)
    assert place.fleet.faults == []
    place.join("d2", Role.DECODE)
    place.says("d2", token(stream.id, 1, last=True))
    assert len(await read_all(stream)) == 2


async def test_silence_everywhere_ends_in_one_error() -> None:
    place = house("p1", "d1", max_attempts=3)
    stream = await place.start()
    place.timers.advance(10_000.0)
    with pytest.raises(WorkerLost, match="attempts"):
        await anext(stream)
    assert len(place.heard.ends) == 1
    assert place.timers.num_live == 0


async def test_the_request_timeout_is_the_last_word() -> None:
    place = house("p1", "d1", request_timeout_s=70.0)
    stream = await place.start()
    place.timers.advance(71.0)
    with pytest.raises(TandemError, match="not finished within 70 s"):
        await anext(stream)
    assert place.aborts_to("p1") == place.aborts_to("d1") == [Abort(stream.id, Generation(1))]


async def test_a_complete_request_speaks_for_its_workers() -> None:
    place = house("p1", "d1")
    stream = await place.start()
    place.says("p1", token(stream.id, 0))
    place.says("d1", token(stream.id, 1, last=True))
    await read_all(stream)
    assert sorted(place.fleet.successes) == ["d1", "p1"]


# A stream that breaks for a moment.


async def test_a_decode_worker_whose_stream_broke_goes_on_from_where_the_client_is() -> None:
    place = house("p1", "d1", "d2")
    stream = await place.start(n=2)
    name, attach = place.last_attach()
    place.says("p1", token(stream.id, 0), token(stream.id, 0, choice=1))
    place.says(name, token(stream.id, 1), token(stream.id, 1, choice=1, last=True))
    place.blink(name)
    again_to, again = place.last_attach()
    assert (again_to, again.generation, again.positions) == (name, attach.generation, (2, 2))
    assert Abort(stream.id, Generation(1), (1,)) in place.aborts_to(name)
    assert place.heard.remedies == []
    place.says(name, token(stream.id, 2), token(stream.id, 3, last=True))
    assert len(await read_all(stream)) == 6


async def test_a_prefill_worker_whose_stream_broke_is_asked_again_if_it_owes_the_first_token() -> None:
    place = house("p1", "d1")
    stream = await place.start()
    place.blink("p1")
    assert place.last_prefill()[1].generation == 2
    place.says("p1", token(stream.id, 0))
    place.blink("p1")
    assert place.last_prefill()[1].generation == 2
    place.says("d1", token(stream.id, 1, last=True))
    assert len(await read_all(stream)) == 2


async def test_blocks_of_a_prefill_worker_whose_stream_broke_are_handed_over_once_more() -> None:
    """It may have said that a decode worker refused them, or never have heard where to send them next."""
    place = house("p1", "d1", "d2")
    stream = await place.start()
    first, _ = place.last_attach()
    place.says("p1", token(stream.id, 0))
    place.blink("p1")
    assert place.heard.remedies == [Remedy.REDIRECT]
    name, attach = place.last_attach()
    to, redirect = place.last_redirect()
    assert (to, redirect.generation, redirect.decode.worker) == ("p1", 2, name)
    assert (attach.generation, attach.local) == (2, False)
    assert place.aborts_to(first) == [Abort(stream.id, Generation(1))]
    assert len([m for m in place.sent_to("p1") if isinstance(m, Prefill)]) == 1
    place.reports(name, stream.id, Stage.ADOPTED)
    place.blink("p1")
    assert place.heard.remedies == [Remedy.REDIRECT]
    place.says(name, token(stream.id, 1, last=True))
    assert len(await read_all(stream)) == 2
    assert place.fleet.faults == []


async def test_a_prefill_worker_that_let_go_while_its_stream_was_broken_is_not_blamed() -> None:
    place = house("p1", "d1", "d2")
    stream = await place.start()
    place.says("p1", token(stream.id, 0))
    place.blink("p1")
    place.rejects("p1", stream.id, RejectReason.UNKNOWN)
    name, attach = place.last_attach()
    assert (attach.generation, attach.request.forced) == (3, ((0,),))
    place.says(name, token(stream.id, 1, last=True))
    assert len(await read_all(stream)) == 2
    assert place.fleet.faults == []
