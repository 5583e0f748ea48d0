"""What a router learns from listening: how far apart tokens are, and how long answers are."""

from __future__ import annotations

import pytest

from proto.ids import Epoch, RequestId
from router.pace import Pace

ONE, TWO = RequestId("r.1"), RequestId("r.2")
D1, D2 = Epoch("d1"), Epoch("d2")


def test_one_token_says_nothing_of_pace() -> None:
    pace = Pace()
    pace.heard(D1, ONE, 1.0)
    pace.heard(D2, ONE, 2.0)  # a resume elsewhere: the pause between is nobody's pace
    assert pace.itl_s == {}


def test_the_pace_is_a_moving_average_per_worker() -> None:
    pace = Pace()
    for at in range(5):
        pace.heard(D1, ONE, float(at))
        pace.heard(D2, TWO, at * 0.1)
    assert pace.itl_s == {D1: pytest.approx(1.0), D2: pytest.approx(0.1)}
    pace.heard(D1, ONE, 15.0)
    assert 1.0 < pace.itl_s[D1] < 11.0
    pace.gone(D1)
    assert list(pace.itl_s) == [D2]


def test_a_request_that_ended_is_forgotten() -> None:
    pace = Pace()
    pace.heard(D1, ONE, 1.0)
    pace.forget(ONE)
    pace.forget(ONE)
    pace.heard(D1, ONE, 100.0)
    assert pace.itl_s == {}


def test_the_usual_length_of_an_answer() -> None:
    pace = Pace()
    pace.complete(100.0)
    assert pace.output_tokens == 100.0
    for _ in range(100):
        pace.complete(10.0)
    assert pace.output_tokens == pytest.approx(10.0, abs=0.1)
