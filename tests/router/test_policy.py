"""Placement: what is eligible, what is cheaper, and that equals share."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.control import Load, Role
from proto.errors import NoWorker, Overloaded, Unavailable
from proto.ids import Epoch
from router.policy import Ask, Candidate, Decision, View, Way, Weights, choose
from tests.support.fleet import BLOCK_SIZE, LAYOUT, candidate

ALWAYS_PAIR = Weights(disagg_threshold=0)


def view(*workers: Candidate) -> View:
    return View(workers=workers, layout=LAYOUT, block_size=BLOCK_SIZE)


def p(name: str, **changes: object) -> Candidate:
    return candidate(name, Role.PREFILL, **changes)


def d(name: str, **changes: object) -> Candidate:
    return candidate(name, Role.DECODE, **changes)


def names(decision: Decision) -> tuple[str | None, str]:
    return (decision.prefill.worker if decision.prefill else None, decision.decode.worker)


def test_a_long_prompt_gets_a_pair() -> None:
    assert names(choose(view(p("p1"), d("d1")), Ask(num_tokens=100), Weights())) == ("p1", "d1")


def test_the_threshold_counts_uncached_tokens_on_decode() -> None:
    fleet, weights = view(p("p1"), d("d1")), Weights(disagg_threshold=64)
    assert choose(fleet, Ask(num_tokens=63), weights).local
    assert not choose(fleet, Ask(num_tokens=64), weights).local
    assert choose(fleet, Ask(num_tokens=143, matches=held(d1=20)), weights).local
    assert not choose(fleet, Ask(num_tokens=144, matches=held(d1=20)), weights).local


def test_threshold_zero_sends_every_prompt_to_prefill() -> None:
    assert not choose(view(p("p1"), d("d1")), Ask(num_tokens=4, matches=held(d1=1)), ALWAYS_PAIR).local


def test_without_a_living_prefill_worker_decode_does_it_all() -> None:
    dead = p("p1", is_usable=False)
    assert names(choose(view(dead, d("d1")), Ask(num_tokens=1000), ALWAYS_PAIR)) == (None, "d1")


def test_the_prefix_holder_computes_less() -> None:
    fleet = view(p("p1"), p("p2"), d("d1"), d("d2"))
    matches = {Epoch("epoch-p2"): 10, Epoch("epoch-d2"): 10}
    for turn in range(4):
        decision = choose(fleet, Ask(num_tokens=100, matches=matches, turn=turn), ALWAYS_PAIR)
        assert names(decision) == ("p2", "d2")


def test_a_long_queue_outweighs_a_short_prefix() -> None:
    busy = p("p2", load=Load(num_waiting_tokens=5000, tokens_per_s=1000.0))
    decision = choose(view(p("p1"), busy, d("d1")), Ask(num_tokens=100, matches={busy.epoch: 10}), ALWAYS_PAIR)
    assert names(decision)[0] == "p1"


def test_a_faster_worker_takes_more() -> None:
    fast = p("p2", load=Load(num_waiting_tokens=1000, tokens_per_s=10_000.0))
    assert names(choose(view(p("p1"), fast, d("d1")), Ask(num_tokens=1000), ALWAYS_PAIR))[0] == "p2"


def test_what_was_just_sent_counts_before_it_is_reported() -> None:
    fleet = view(p("p1", sent_tokens=400), p("p2"), d("d1", sent_choices=9), d("d2"))
    for turn in range(4):
        assert names(choose(fleet, Ask(num_tokens=100, turn=turn), ALWAYS_PAIR)) == ("p2", "d2")


def test_decode_without_room_is_the_last_choice_but_not_forbidden() -> None:
    crowded = d("d1", load=Load(num_blocks=100, num_free_blocks=0))
    busy = d("d2", load=Load(num_running=50, num_blocks=100, num_free_blocks=60))
    assert names(choose(view(p("p1"), crowded, busy), Ask(num_tokens=100), ALWAYS_PAIR))[1] == "d2"
    assert names(choose(view(p("p1"), crowded), Ask(num_tokens=100), ALWAYS_PAIR))[1] == "d1"


def test_room_that_will_soon_be_there_is_better_than_none_and_worse_than_what_is_free() -> None:
    def with_room(name: str, free: int, soon: int, running: int = 2) -> Candidate:
        load = Load(num_running=running, num_blocks=100, num_free_blocks=free, num_soon_free_blocks=soon)
        return d(name, load=load)

    never, soon, now = with_room("d1", 5, 0), with_room("d2", 5, 60), with_room("d3", 65, 0)
    for turn in range(3):
        ask = Ask(num_tokens=100, turn=turn)
        assert names(choose(view(p("p1"), never, soon), ask, ALWAYS_PAIR))[1] == "d2"
        assert names(choose(view(p("p1"), never, soon, now), ask, ALWAYS_PAIR))[1] == "d3"


def test_what_others_will_grow_by_is_no_room() -> None:
    """26 blocks are wanted, and 40 free: but 30 sequences will each want another."""
    busy = d("d1", load=Load(num_running=30, num_blocks=100, num_free_blocks=40))
    calm = d("d2", load=Load(num_running=60, num_blocks=100, num_free_blocks=90))
    for turn in range(2):
        assert names(choose(view(p("p1"), busy, calm), Ask(num_tokens=100, turn=turn), ALWAYS_PAIR))[1] == "d2"


def test_room_that_was_just_promised_is_not_free() -> None:
    taken = d("d1", sent_room_tokens=100 * BLOCK_SIZE)
    for turn in range(2):
        assert names(choose(view(p("p1"), taken, d("d2")), Ask(num_tokens=40, turn=turn), ALWAYS_PAIR))[1] == "d2"


def test_equals_share_the_load() -> None:
    fleet = view(p("p1"), p("p2"), p("p3"), d("d1"), d("d2"))
    chosen = [names(choose(fleet, Ask(num_tokens=100, turn=turn), ALWAYS_PAIR)) for turn in range(60)]
    assert Counter(prefill for prefill, _ in chosen) == {"p1": 20, "p2": 20, "p3": 20}
    assert Counter(decode for _, decode in chosen) == {"d1": 30, "d2": 30}


def test_a_resume_goes_to_equal_numerics_before_anything_else() -> None:
    near, far = d("d1", numerics="avx512"), d("d2", numerics="avx2")
    for way in (Way.LOCAL, Way.RESUME):
        ask = Ask(num_tokens=100, way=way, matches={far.epoch: 25}, numerics="avx512")
        assert names(choose(view(p("p1"), near, far), ask, Weights())) == (None, "d1")
        assert names(choose(view(p("p1"), far), ask, Weights())) == (None, "d2")


def held(**blocks: int) -> dict[Epoch, int]:
    return {Epoch(f"epoch-{name}"): count for name, count in blocks.items()}


def resume(matches: dict[Epoch, int], **changes: object) -> Ask:
    return Ask(num_tokens=200, way=Way.RESUME, matches=matches, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("matches", "placed"),
    [
        ({}, (None, "d1")),
        (held(p1=50), ("p1", "d1")),
        (held(p1=20, p2=50), ("p2", "d1")),
        (held(p1=50, d1=35), (None, "d1")),  # 60 tokens are left to it
        (held(p1=50, d1=33), ("p1", "d1")),  # 68 are, and all but the last one spared
        (held(p1=15), (None, "d1")),  # 60 tokens spared are not worth the way
        (held(p1=16), ("p1", "d1")),
    ],
)
def test_a_resume_comes_from_a_prefill_worker_that_spares_the_decode_worker_enough(
    matches: dict[Epoch, int], placed: tuple[str | None, str]
) -> None:
    assert names(choose(view(p("p1"), p("p2"), d("d1")), resume(matches), Weights(disagg_threshold=64))) == placed


def test_a_resume_arrives_where_least_is_lacking() -> None:
    fleet, matches = view(p("p1"), d("d1"), d("d2")), held(p1=50, d2=20)
    assert names(choose(fleet, resume(matches), Weights())) == ("p1", "d2")


@pytest.mark.parametrize(
    "changes",
    [{"is_usable": False}, {"is_distrusted": True}, {"full_for_s": 1.0}, {"layout": "layout-b"}],
)
def test_a_resume_does_without_a_prefill_worker_that_cannot(changes: dict[str, object]) -> None:
    fleet = view(p("p1", **changes), d("d1"))
    assert names(choose(fleet, resume(held(p1=50)), Weights())) == (None, "d1")


def test_a_resume_does_without_a_prefill_worker_it_has_failed_on() -> None:
    ask = resume(held(p1=50, p2=40), avoid=frozenset({Epoch("epoch-p1")}))
    assert names(choose(view(p("p1"), p("p2"), d("d1")), ask, Weights())) == ("p2", "d1")
    assert names(choose(view(p("p1"), d("d1")), ask, Weights())) == (None, "d1")


def test_several_choices_resume_on_a_decode_worker() -> None:
    assert choose(view(p("p1"), d("d1")), resume(held(p1=50), num_choices=2), Weights()).local


def test_a_worker_that_failed_the_request_is_no_better_than_one_that_is_full_for_a_moment() -> None:
    fleet = view(p("p1"), d("d1"), d("d2", full_for_s=0.7))
    for way in Way:
        ask = Ask(num_tokens=100, way=way, avoid=frozenset({Epoch("epoch-d1")}))
        with pytest.raises(Overloaded) as caught:
            choose(fleet, ask, ALWAYS_PAIR)
        assert caught.value.retry_after_s == 0.7


def test_where_every_prefill_worker_has_failed_the_request_the_decode_worker_computes_it() -> None:
    tried = frozenset({Epoch("epoch-p1"), Epoch("epoch-p2")})
    assert choose(view(p("p1"), p("p2"), d("d1")), Ask(num_tokens=100, avoid=tried), ALWAYS_PAIR).local
    full = view(p("p1", full_for_s=2.0), p("p2", full_for_s=1.0), d("d1"))
    with pytest.raises(Overloaded):
        choose(full, Ask(num_tokens=100, avoid=tried), ALWAYS_PAIR)


def test_a_redirect_wants_a_decode_worker_only() -> None:
    decision = choose(
        view(d("d1"), d("d2")), Ask(num_tokens=100, way=Way.DECODE, avoid=frozenset({Epoch("epoch-d1")})), Weights()
    )
    assert names(decision) == (None, "d2")
    assert not decision.local


def test_full_workers_mean_429_with_the_shortest_wait() -> None:
    fleet = view(p("p1", full_for_s=3.0), p("p2", full_for_s=1.5), d("d1"))
    with pytest.raises(Overloaded) as caught:
        choose(fleet, Ask(num_tokens=100), ALWAYS_PAIR)
    assert caught.value.retry_after_s == 1.5


def test_workers_of_another_model_are_not_paired_and_the_error_says_so() -> None:
    with pytest.raises(NoWorker, match=r"no prefill worker serves this deployment's model.*layout-b"):
        choose(view(p("p1", layout="layout-b"), d("d1")), Ask(num_tokens=100), ALWAYS_PAIR)
    with pytest.raises(NoWorker, match="no decode worker serves"):
        choose(view(p("p1"), d("d1", layout="layout-b")), Ask(num_tokens=100), ALWAYS_PAIR)


def test_nobody_connected() -> None:
    with pytest.raises(NoWorker, match="no decode worker is connected"):
        choose(view(p("p1")), Ask(num_tokens=100), ALWAYS_PAIR)


def workers(role: Role) -> st.SearchStrategy[Candidate]:
    return st.builds(
        lambda number, usable, layout, full, load, sent: candidate(
            f"{role.value[0]}{number}",
            role,
            is_usable=usable,
            layout=layout,
            full_for_s=full,
            load=load,
            sent_tokens=sent,
        ),
        st.integers(0, 99),
        st.booleans(),
        st.sampled_from([LAYOUT, LAYOUT, "layout-b"]),
        st.sampled_from([0.0, 0.0, 2.0]),
        st.builds(
            Load,
            num_running=st.integers(0, 50),
            num_waiting=st.integers(0, 50),
            num_waiting_tokens=st.integers(0, 100_000),
            num_free_blocks=st.integers(0, 100),
            num_blocks=st.just(100),
            tokens_per_s=st.sampled_from([0.0, 500.0, 20_000.0]),
            num_soon_free_blocks=st.integers(0, 50),
        ),
        st.integers(0, 10_000),
    )


FLEETS = st.tuples(
    st.lists(workers(Role.PREFILL), max_size=5, unique_by=lambda each: each.epoch),
    st.lists(workers(Role.DECODE), max_size=5, unique_by=lambda each: each.epoch),
).map(lambda both: view(*both[0], *both[1]))


@st.composite
def asks(draw: st.DrawFn, fleet: View) -> Ask:
    epochs = [worker.epoch for worker in fleet.workers]
    num_tokens = draw(st.integers(1, 2000))
    depth = st.integers(0, num_tokens // BLOCK_SIZE)
    return Ask(
        num_tokens=num_tokens,
        num_choices=draw(st.integers(1, 4)),
        matches={epoch: draw(depth) for epoch in epochs if draw(st.booleans())},
        way=draw(st.sampled_from(Way)),
        turn=draw(st.integers(0, 1000)),
        avoid=frozenset(epoch for epoch in epochs if draw(st.integers(0, 5)) == 0),
        numerics=draw(st.sampled_from(["", "n"])),
    )


@given(data=st.data(), threshold=st.sampled_from([0, 64, 512]))
def test_only_the_eligible_are_picked(data: st.DataObject, threshold: int) -> None:
    fleet = data.draw(FLEETS)
    ask = data.draw(asks(fleet))
    weights = Weights(disagg_threshold=threshold)
    try:
        decision = choose(fleet, ask, weights)
    except Unavailable:
        return
    picked = [worker for worker in (decision.prefill, decision.decode) if worker is not None]
    for worker in picked:
        assert worker.is_usable
        assert worker.layout == LAYOUT
        assert worker.full_for_s == 0
        assert worker.epoch not in ask.avoid
    assert decision.decode.role is Role.DECODE
    assert decision.prefill is None or decision.prefill.role is Role.PREFILL
    assert decision.prefill is None or (ask.way in (Way.PAIR, Way.RESUME) and not decision.local)
    assert decision == choose(fleet, ask, weights)


@given(data=st.data(), threshold=st.sampled_from([0, 64]))
def test_more_cached_prefix_never_makes_the_chosen_less_attractive(data: st.DataObject, threshold: int) -> None:
    fleet = data.draw(FLEETS)
    ask = data.draw(asks(fleet))
    weights = Weights(disagg_threshold=threshold)
    try:
        decision = choose(fleet, ask, weights)
    except Unavailable:
        return
    epoch = decision.decode.epoch
    more = data.draw(st.integers(ask.matches.get(epoch, 0), ask.num_tokens // BLOCK_SIZE))
    richer = dataclasses.replace(ask, matches={**ask.matches, epoch: more})
    assert choose(fleet, richer, weights).decode == decision.decode
    if decision.prefill is not None:
        epoch = decision.prefill.epoch
        more = data.draw(st.integers(ask.matches.get(epoch, 0), ask.num_tokens // BLOCK_SIZE))
        richer = dataclasses.replace(ask, matches={**ask.matches, epoch: more})
        assert choose(fleet, richer, weights).prefill == decision.prefill
