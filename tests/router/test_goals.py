"""A request that would miss its goals is turned away before any work is done for it; what is under way never is."""

from __future__ import annotations

import pytest

from proto.control import Load, RejectReason, Role
from proto.errors import Overloaded
from proto.ids import Epoch
from router.policy import Ask, Candidate, Goals, View, Weights, choose
from tests.support.fleet import BLOCK_SIZE, LAYOUT, House, candidate, token


def view(*workers: Candidate) -> View:
    return View(workers=workers, layout=LAYOUT, block_size=BLOCK_SIZE)


def prefill(name: str, *, waiting: int, rate: float = 1000.0) -> Candidate:
    return candidate(name, Role.PREFILL, load=Load(num_waiting_tokens=waiting, tokens_per_s=rate))


def decode(name: str, *, running: int = 0, free: int = 100, waiting: int = 0, **more: object) -> Candidate:
    load = Load(
        num_running=running, num_blocks=100, num_free_blocks=free, num_waiting_tokens=waiting, tokens_per_s=1000.0
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
    old = Ask(num_tokens=100, itl_s={Epoch("epoch-d1"): 10.0})
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


def test_a_distrusted_worker_is_the_last_resort_for_decode_and_none_for_prefill() -> None:
    bad = candidate("d1", Role.DECODE, is_distrusted=True)
    good = candidate("d2", Role.DECODE)
    lost = candidate("p1", Role.PREFILL, is_distrusted=True)
    assert all(choose(view(bad, good), Ask(num_tokens=9, turn=turn), WEIGHTS).decode is good for turn in range(4))
    decision = choose(view(bad, lost), Ask(num_tokens=9), WEIGHTS)
    assert (decision.decode, decision.local) == (bad, True)


async def test_nothing_is_sent_for_a_request_that_is_turned_away() -> None:
    house = House("p1", "d1", goals=Goals(ttft_s=0.001))
    with pytest.raises(Overloaded) as caught:
        await house.start(range(100))
    assert caught.value.retry_after_s is not None
    assert not house.fleet.sent
    assert house.heard.turned == [caught.value]
    assert house.flow.num_inflight == house.admission.num_inflight == 0


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
