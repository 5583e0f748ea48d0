"""A request that would miss its goals is turned away before any work is done for it; what is under way never is."""

from __future__ import annotations

import pytest

from proto.control import Load, RejectReason, Role
from proto.errors import Overloaded
from proto.ids import Epoch
from proto.lifecycle import Stage
from router.policy import ROOM_S, Ask, Candidate, Goals, View, Way, Weights, choose
from tests.support.fleet import BLOCK_SIZE, LAYOUT, House, candidate, token


def view(*workers: Candidate) -> View:
    return View(workers=workers, layout=LAYOUT, block_size=BLOCK_SIZE)


def prefill(name: str, *, waiting: int, rate: float = 1000.0) -> Candidate:
    return candidate(name, Role.PREFILL, load=Load(num_waiting_tokens=waiting, tokens_per_s=rate))


def decode(
    name: str, *, running: int = 0, free: int = 100, soon: int = 0, waiting: int = 0, queued: int = 0, **more: object
) -> Candidate:
    load = Load(
        num_running=running,
        num_waiting=queued,
        num_blocks=100,
        num_free_blocks=free,
        num_soon_free_blocks=soon,
        num_waiting_tokens=waiting,
        tokens_per_s=1000.0,
    )
    return candidate(name, Role.DECODE, load=load, **more)


WEIGHTS = Weights(disagg_threshold=0)
NEW = Ask(num_tokens=100, is_new=True)


def test_the_first_token_is_predicted_from_the_queue_and_the_rate() -> None:
    fleet = view(prefill("p1", waiting=5000), prefill("p2", waiting=1900), decode("d1"))
    goals = Goals(ttft_s=2.5)
    chosen = choose(fleet, NEW, WEIGHTS, goals).prefill
    assert chosen is not None
    assert chosen.worker == "p2"
    with pytest.raises(Overloaded, match="more than 1 s") as caught:
        choose(fleet, NEW, WEIGHTS, Goals(ttft_s=1.0))
    assert caught.value.retry_after_s == pytest.approx(1.0)  # 2.0 s predicted
    with pytest.raises(Overloaded) as caught:
        choose(view(prefill("p1", waiting=9900), decode("d1")), NEW, WEIGHTS, Goals(ttft_s=1.0))
    assert caught.value.retry_after_s == pytest.approx(9.0)


def test_an_idle_worker_takes_what_it_is_given() -> None:
    """What is known of its rate may be a slow small step's, and nothing but work corrects that."""
    assert choose(view(prefill("p1", waiting=0, rate=1.0), decode("d1")), NEW, WEIGHTS, Goals(ttft_s=1.0)).prefill
    assert choose(view(decode("d1")), NEW, WEIGHTS, Goals(ttft_s=0.01)).local
    with pytest.raises(Overloaded, match="first token"):
        choose(view(prefill("p1", waiting=1, rate=1.0), decode("d1")), NEW, WEIGHTS, Goals(ttft_s=1.0))


def test_a_cached_prompt_meets_a_goal_that_another_does_not() -> None:
    fleet = view(prefill("p1", waiting=950), decode("d1"))
    goals = Goals(ttft_s=1.0)
    with pytest.raises(Overloaded):
        choose(fleet, NEW, WEIGHTS, goals)
    cached = Ask(num_tokens=100, is_new=True, matches={Epoch("epoch-p1"): 20})
    assert choose(fleet, cached, WEIGHTS, goals).prefill is not None


def test_a_local_prompt_has_the_same_goal() -> None:
    with pytest.raises(Overloaded, match="first token"):
        choose(view(decode("d1", waiting=5000)), NEW, WEIGHTS, Goals(ttft_s=1.0))


def test_what_is_under_way_is_never_turned_away() -> None:
    fleet = view(prefill("p1", waiting=50_000), decode("d1", running=90, free=0))
    for way in Way:
        old = Ask(num_tokens=100, itl_s={Epoch("epoch-d1"): 10.0}, output_tokens=1000.0, way=way)
        assert choose(fleet, old, WEIGHTS, Goals(ttft_s=0.1, itl_s=0.01)).decode.worker == "d1"


def test_a_decode_worker_that_is_too_slow_gets_nothing_new() -> None:
    fleet = view(prefill("p1", waiting=0), decode("d1", running=4), decode("d2", running=4))
    slow = {Epoch("epoch-d1"): 0.2, Epoch("epoch-d2"): 0.04}
    ask = Ask(num_tokens=100, is_new=True, itl_s=slow)
    assert choose(fleet, ask, WEIGHTS, Goals(itl_s=0.1)).decode.worker == "d2"
    with pytest.raises(Overloaded, match=r"0\.01 s per token"):
        choose(fleet, ask, WEIGHTS, Goals(itl_s=0.01))
    assert choose(fleet, ask, WEIGHTS).decode.worker in ("d1", "d2")


def test_an_idle_worker_was_slow_once_and_may_be_asked() -> None:
    fleet = view(prefill("p1", waiting=0), decode("d1"))
    ask = Ask(num_tokens=100, is_new=True, itl_s={Epoch("epoch-d1"): 9.0})
    assert choose(fleet, ask, WEIGHTS, Goals(itl_s=0.1)).decode.worker == "d1"


@pytest.mark.parametrize(
    ("free", "usual", "fits"), [(60, 0.0, True), (60, 40.0, False), (24, 0.0, False), (95, 40.0, True)]
)
def test_room_is_kept_for_what_runs_to_grow(free: int, usual: float, fits: bool) -> None:
    """100 tokens need 25 blocks; eight sequences will grow by half an answer each, and the new one by a whole."""
    fleet = view(prefill("p1", waiting=0), decode("d1", running=8, free=free))
    ask = Ask(num_tokens=100, is_new=True, output_tokens=usual)
    if fits:
        assert choose(fleet, ask, WEIGHTS, Goals(itl_s=1.0)).decode.worker == "d1"
    else:
        with pytest.raises(Overloaded):
            choose(fleet, ask, WEIGHTS, Goals(itl_s=1.0))
    assert choose(fleet, ask, WEIGHTS).decode.worker == "d1"


def test_what_was_sent_already_takes_room_too() -> None:
    fleet = view(prefill("p1", waiting=0), decode("d1", running=1, free=60, sent_room_tokens=160))
    with pytest.raises(Overloaded):
        choose(fleet, NEW, WEIGHTS, Goals(itl_s=1.0))


def test_growth_may_take_what_is_soon_free_but_the_prompt_may_not() -> None:
    ask = Ask(num_tokens=100, is_new=True, output_tokens=40.0)
    for free, soon, fits in ((60, 0, False), (60, 20, True), (60, 10, False), (24, 76, False)):
        fleet = view(prefill("p1", waiting=0), decode("d1", running=8, free=free, soon=soon))
        if fits:
            assert choose(fleet, ask, WEIGHTS, Goals(itl_s=1.0)).decode.worker == "d1"
        else:
            with pytest.raises(Overloaded):
                choose(fleet, ask, WEIGHTS, Goals(itl_s=1.0))


PACE = {Epoch("epoch-d1"): 0.1, Epoch("epoch-d2"): 0.1}


def test_a_prompt_that_gets_no_room_within_the_goal_is_turned_away() -> None:
    """100 tokens are 25 blocks, the answer's first is one, and the other sequence will want one: 17 more than there
    are. Soon is within 32 tokens, of 0.1 s each."""
    ask = Ask(num_tokens=100, is_new=True, itl_s=PACE)
    goals = Goals(ttft_s=2.0)
    slow, quick = (decode(name, running=1, free=10, soon=soon) for name, soon in (("d1", 17), ("d2", 34)))
    assert choose(view(prefill("p1", waiting=0), slow, quick), ask, WEIGHTS, goals).decode.worker == "d2"
    with pytest.raises(Overloaded, match="room for it within 2 s") as caught:
        choose(view(prefill("p1", waiting=0), slow), ask, WEIGHTS, goals)
    assert caught.value.retry_after_s == pytest.approx(1.2)
    assert choose(view(prefill("p1", waiting=0), slow), ask, WEIGHTS).decode.worker == "d1"
    assert choose(view(prefill("p1", waiting=0), decode("d1", running=1, free=27)), ask, WEIGHTS, goals)


def test_a_prompt_that_is_computed_on_the_decode_worker_needs_the_same_room() -> None:
    ask = Ask(num_tokens=100, is_new=True, itl_s=PACE)
    with pytest.raises(Overloaded, match="room"):
        choose(view(decode("d1", running=1, free=10, soon=17)), ask, WEIGHTS, Goals(ttft_s=2.0))


def test_an_end_that_nobody_can_tell_is_late_for_a_goal_and_for_nothing_else() -> None:
    fleet = view(prefill("p1", waiting=0), decode("d1", running=1, free=10))
    ask = Ask(num_tokens=100, is_new=True, itl_s=PACE)
    with pytest.raises(Overloaded) as caught:
        choose(fleet, ask, WEIGHTS, Goals(ttft_s=1000.0))
    assert caught.value.retry_after_s == 1.0
    assert choose(fleet, ask, WEIGHTS).decode.worker == "d1"


def test_without_a_goal_the_predicted_wait_for_room_is_bounded() -> None:
    """The memory is in use, and an answer takes 200 s: 26 blocks and one for growth are free after 27 % of it, or after
    what waits there has had 75 more."""
    ask = Ask(num_tokens=100, is_new=True, itl_s=PACE, output_tokens=2000.0)
    p1 = prefill("p1", waiting=0)
    assert choose(view(p1, decode("d1", running=1, free=0)), ask, WEIGHTS).decode.worker == "d1"  # in 54 s
    queued = decode("d1", running=1, free=0, queued=3, waiting=300)
    with pytest.raises(Overloaded, match="within 120 s") as caught:
        choose(view(p1, queued), ask, WEIGHTS)
    assert caught.value.retry_after_s == pytest.approx(200 * 102 / 101 - ROOM_S)
    assert choose(view(p1, queued, decode("d2", running=90, free=30)), ask, WEIGHTS).decode.worker == "d2"
    assert choose(view(p1, queued), Ask(num_tokens=100, itl_s=PACE, output_tokens=2000.0), WEIGHTS)


def test_what_was_announced_and_waits_elsewhere_comes_before() -> None:
    """Half of the memory is free, but ten prompts of 25 blocks are on their way, and turn it over twice."""
    fleet = view(prefill("p1", waiting=0), decode("d1", running=1, free=50))
    announced = {Epoch("epoch-d1"): 1000}
    goals = Goals(ttft_s=10.0)
    ask = Ask(num_tokens=100, is_new=True, itl_s=PACE, output_tokens=100.0)
    assert choose(fleet, ask, WEIGHTS, goals).decode.worker == "d1"
    busy = Ask(num_tokens=100, is_new=True, itl_s=PACE, output_tokens=100.0, announced=announced)
    with pytest.raises(Overloaded, match="room"):
        choose(fleet, busy, WEIGHTS, goals)
    assert choose(view(*fleet.workers, decode("d2", running=1, free=50)), busy, WEIGHTS, goals).decode.worker == "d2"


def test_an_idle_worker_turns_nothing_away() -> None:
    for tokens in (396, 400, 4000):
        ask = Ask(num_tokens=tokens, num_choices=4, is_new=True, itl_s=PACE, output_tokens=1e6)
        assert choose(view(decode("d1")), ask, WEIGHTS, Goals(ttft_s=5.0)).decode.worker == "d1"


def test_a_worker_of_an_older_version_says_nothing_of_soon_free_blocks() -> None:
    """Usual answers tell then."""
    fleet = view(prefill("p1", waiting=0), decode("d1", running=1, free=10))
    ask = Ask(num_tokens=100, is_new=True, itl_s=PACE, output_tokens=90.0)  # 17 of 90 blocks
    assert choose(fleet, ask, WEIGHTS, Goals(ttft_s=1.8)).decode.worker == "d1"
    with pytest.raises(Overloaded):
        choose(fleet, ask, WEIGHTS, Goals(ttft_s=1.6))


def test_a_distrusted_worker_is_the_last_resort_for_decode_and_none_for_prefill() -> None:
    bad = candidate("d1", Role.DECODE, is_distrusted=True)
    good = candidate("d2", Role.DECODE)
    lost = candidate("p1", Role.PREFILL, is_distrusted=True)
    assert all(choose(view(bad, good), Ask(num_tokens=9, turn=turn), WEIGHTS).decode is good for turn in range(4))
    decision = choose(view(bad, lost), Ask(num_tokens=9), WEIGHTS)
    assert (decision.decode, decision.local) == (bad, True)


async def test_nothing_is_sent_for_a_request_that_is_turned_away() -> None:
    house = House("p1", "d1", goals=Goals(ttft_s=0.001))
    house.fleet.workers[Epoch("epoch-p1")] = prefill("p1", waiting=10)
    with pytest.raises(Overloaded) as caught:
        await house.start(range(100))
    assert caught.value.retry_after_s is not None
    assert not house.fleet.sent
    assert house.heard.turned == [caught.value]
    assert house.flow.num_inflight == house.admission.num_inflight == 0


async def test_nothing_is_sent_where_no_decode_worker_will_have_room() -> None:
    house = House("p1", "d1", goals=Goals(ttft_s=1.0))
    first = await house.start(range(100))
    house.fleet.sent.clear()
    house.fleet.workers[Epoch("epoch-d1")] = decode("d1", running=1, free=10)
    with pytest.raises(Overloaded, match="room") as caught:
        await house.start(range(100))
    assert caught.value.retry_after_s == 1.0
    assert not house.fleet.sent
    house.kill("p1")  # the one under way goes on, and needs the same room
    assert house.last_attach()[1].local
    await first.aclose()


async def test_prompts_that_wait_for_room_are_counted_until_they_have_it() -> None:
    """100 blocks of 4 tokens, 40 in use: two prompts of 25 find room, the third only when one of them is over."""
    house = House("p1", "d1", goals=Goals(ttft_s=1.0))
    house.fleet.workers[Epoch("epoch-d1")] = decode("d1", running=1, free=60)
    first, second = [await house.start(range(start, start + 100)) for start in (0, 1000)]
    with pytest.raises(Overloaded, match="room"):
        await house.start(range(2000, 2100))
    house.reports("p1", first.id, Stage.STREAMING, generation=1)  # from here on it is in the worker's load
    third = await house.start(range(2000, 2100))
    with pytest.raises(Overloaded, match="room"):
        await house.start(range(3000, 3100))
    house.rejects("p1", second.id, RejectReason.REFUSED, held=True, generation=1)
    with pytest.raises(Overloaded, match="room"):  # it still waits for that room
        await house.start(range(3000, 3100))
    await second.aclose()
    last = await house.start(range(3000, 3100))
    for stream in (first, third, last):
        await stream.aclose()


async def test_a_retry_is_not_measured_by_the_goals() -> None:
    house = House("p1", "p2", "d1", goals=Goals(ttft_s=0.2))
    stream = await house.start(range(100))
    first, _ = house.last_prefill()
    other = Epoch("epoch-p2" if first == "p1" else "epoch-p1")
    house.fleet.workers[other] = candidate(
        other.removeprefix("epoch-"), Role.PREFILL, load=Load(num_waiting_tokens=10**6)
    )
    house.rejects(first, stream.id, RejectReason.DRAINING)
    assert f"epoch-{house.last_prefill()[0]}" == other
    await stream.aclose()


async def test_the_pace_is_learnt_from_the_tokens() -> None:
    house = House("p1", "d1", goals=Goals(itl_s=0.5))
    stream = await house.start()
    house.says("p1", token(stream.id, 0))
    for position in range(1, 4):
        house.says("d1", token(stream.id, position))
        house.timers.advance(1.0)
    house.fleet.workers[Epoch("epoch-d1")] = decode("d1", running=1)
    with pytest.raises(Overloaded, match="per token"):
        await house.start()
    await stream.aclose()
