"""A worker's budget of faults, on a clock that moves when told to."""

from __future__ import annotations

import pytest

from router.trust import FIRST_PAUSE_S, HALF_LIFE_S, LONGEST_PAUSE_S, MAX_FAULTS, Trust


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def trust(clock: Clock) -> Trust:
    return Trust(clock)


def spend(trust: Trust) -> None:
    while not trust.failed():
        pass


def test_a_few_faults_are_forgiven(trust: Trust) -> None:
    assert [trust.failed() for _ in range(int(MAX_FAULTS))] == [False] * int(MAX_FAULTS - 1) + [True]
    assert trust.is_out
    assert not trust.failed()


def test_faults_fade(trust: Trust, clock: Clock) -> None:
    for _ in range(50):
        assert not trust.failed()
        clock.now += HALF_LIFE_S / 2
    clock.now += 100 * HALF_LIFE_S
    assert trust.is_untouched


def test_a_worker_that_serves_most_is_not_sent_away(trust: Trust) -> None:
    for _ in range(50):
        trust.served()
        trust.served()
        trust.failed()
    assert not trust.is_out


def test_it_comes_back_after_its_time_and_a_good_probe(trust: Trust, clock: Clock) -> None:
    spend(trust)
    assert not trust.probed(is_well=True)
    clock.now += FIRST_PAUSE_S
    assert not trust.probed(is_well=False)
    assert not trust.probed(is_well=True)
    clock.now += FIRST_PAUSE_S
    assert trust.probed(is_well=True)
    assert not trust.is_out
    assert not trust.probed(is_well=True)


def test_on_probation_one_fault_is_enough_and_the_pause_doubles(trust: Trust, clock: Clock) -> None:
    spend(trust)
    for expected in (FIRST_PAUSE_S * 2, FIRST_PAUSE_S * 4, FIRST_PAUSE_S * 8):
        clock.now += LONGEST_PAUSE_S
        assert trust.probed(is_well=True)
        assert trust.failed()
        clock.now += expected - 0.1
        assert not trust.probed(is_well=True)
        clock.now += 0.2


def test_a_success_ends_the_probation(trust: Trust, clock: Clock) -> None:
    spend(trust)
    clock.now += FIRST_PAUSE_S
    trust.probed(is_well=True)
    trust.served()
    assert not trust.failed()
    assert not trust.is_untouched
    clock.now += 2 * LONGEST_PAUSE_S
    assert trust.is_untouched


def test_no_pause_is_longer_than_the_longest(trust: Trust, clock: Clock) -> None:
    spend(trust)
    for _ in range(12):
        clock.now += LONGEST_PAUSE_S
        assert trust.probed(is_well=True)
        assert trust.failed()
