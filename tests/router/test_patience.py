"""Pauses grow, and waiting ends."""

from __future__ import annotations

from router.patience import FIRST_PAUSE_S, LONGEST_PAUSE_S, Patience


def test_pauses_double_up_to_the_longest_and_start_over() -> None:
    patience = Patience(10.0, 100.0)
    pauses = [patience.pause() for _ in range(20)]
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses[-1] == LONGEST_PAUSE_S
    patience.moved_on()
    assert patience.pause() == FIRST_PAUSE_S
    assert patience.pause(at_least=7.0) == 7.0


def test_being_alone_has_an_end_that_a_worker_postpones() -> None:
    patience = Patience(10.0, 100.0)
    assert patience.alone(0.0)
    assert patience.alone(9.9)
    patience.placed()
    assert patience.alone(15.0)
    assert not patience.alone(25.0)


def test_waiting_for_room_goes_on_through_placements() -> None:
    patience = Patience(10.0, 100.0)
    assert patience.refused(0.0)
    patience.placed()
    assert not patience.refused(100.0)
    patience.moved_on()
    assert patience.refused(200.0)
