"""Percentiles, rates and goodput of outcomes whose times are written here."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.figures import figures_of, is_good, percentile, spread
from bench.load import Run
from bench.outcome import Failure
from bench.settings import METRICS, Wanted
from tests.bench.scripted import answer

ALL = Wanted(METRICS, (50.0, 99.0))


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40),
    st.floats(0, 100),
)
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(sorted(values), percent) == pytest.approx(
        float(np.percentile(values, percent)), rel=1e-9, abs=1e-6
    )


def test_a_spread_is_numpys() -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    found = spread(values, (90.0,))
    assert found is not None
    assert found.mean == pytest.approx(np.mean(values))
    assert found.median == np.median(values)
    assert found.std == pytest.approx(np.std(values))
    assert found.percentiles == ((90.0, pytest.approx(np.percentile(values, 90))),)
    assert spread([], (90.0,)) is None


def test_rates_and_means() -> None:
    run = Run((answer(1.0, 2.0, 4.0), answer(3.0, 4.0, 5.0, sent=1.0)), duration_s=8.0)
    found = figures_of(run, ALL)
    assert (found.completed, found.failed) == (2, 0)
    assert (found.input_tokens, found.output_tokens) == (20, 6)
    assert (found.request_rate, found.output_rate, found.token_rate) == (0.25, 0.75, 3.25)
    means = {metric: one.mean for metric, one in found.spreads.items() if one is not None}
    assert means == {"ttft": 2000.0, "tpot": 1250.0, "itl": 1250.0, "e2el": 4500.0}


def test_failures_are_counted_and_averaged_nowhere() -> None:
    good = answer(1.0, 2.0)
    bad = [Failure(0.0, 500.0, "boom"), Failure(0.0, 0.001, "refused"), Failure(0.0, 0.002, "refused")]
    alone = figures_of(Run((good,), 4.0), ALL)
    found = figures_of(Run((bad[0], good, *bad[1:]), 4.0), ALL)
    assert (found.completed, found.failed) == (1, 3)
    assert found.errors == (("refused", 2), ("boom", 1))
    assert found.spreads == alone.spreads
    assert (found.output_tokens, found.request_rate) == (alone.output_tokens, alone.request_rate)


def test_nothing_measured_is_none_and_not_zero() -> None:
    found = figures_of(Run((Failure(0.0, 1.0, "boom"),), 1.0), ALL)
    assert found.spreads == dict.fromkeys(METRICS)
    assert found.request_rate == 0.0
    single = figures_of(Run((answer(1.0),), 1.0), ALL)
    assert single.spreads["tpot"] is None
    assert single.spreads["itl"] is None
    assert single.spreads["ttft"] is not None


def test_itl_has_a_sample_per_gap_and_tpot_one_per_answer() -> None:
    run = Run((answer(1.0, 2.0, 3.0, 4.0, 5.0), answer(1.0, 9.0)), 10.0)
    found = figures_of(run, Wanted(METRICS, (0.0, 100.0)))
    itl, tpot = found.spreads["itl"], found.spreads["tpot"]
    assert itl is not None
    assert tpot is not None
    assert itl.mean == pytest.approx((4 * 1000 + 8000) / 5)
    assert tpot.mean == pytest.approx((1000 + 8000) / 2)
    assert itl.percentiles == ((0.0, 1000.0), (100.0, 8000.0))


def test_only_what_is_wanted_is_reported_in_the_usual_order() -> None:
    found = figures_of(Run((answer(1.0, 2.0),), 1.0), Wanted(("e2el", "ttft"), (99.0,)))
    assert list(found.spreads) == ["ttft", "e2el"]


@pytest.mark.parametrize(
    ("limits", "is_kept"),
    [
        ({"ttft": 1000.0}, True),
        ({"ttft": 999.0}, False),
        ({"tpot": 500.0}, True),
        ({"tpot": 499.0}, False),
        ({"e2el": 2000.0}, True),
        ({"ttft": 1000.0, "tpot": 500.0, "e2el": 1999.0}, False),
    ],
)
def test_a_good_answer_keeps_every_limit(limits: dict[str, float], is_kept: bool) -> None:
    assert is_good(answer(1.0, 1.5, 2.0), limits) is is_kept


def test_goodput_counts_good_answers_per_second() -> None:
    run = Run((answer(1.0), answer(3.0), Failure(0.0, 0.1, "boom")), 4.0)
    assert figures_of(run, Wanted(goodput={"ttft": 2000.0, "tpot": 0.0})).goodput == 0.25
    assert figures_of(run, Wanted()).goodput is None


def test_the_peak_of_output_is_of_one_second_and_shares_a_pieces_tokens() -> None:
    run = Run((answer(0.1, 0.2, 1.5, tokens=6), answer(0.5, 1.1, sent=0.4)), 2.0)
    # Second 0: 2 pieces of 2 tokens, and one of one at 0.9; second 1: one of 2, and one of one.
    assert figures_of(run, ALL).peak_output_rate == 5.0


def test_the_peak_of_concurrency_counts_overlaps_only() -> None:
    run = Run((answer(2.0), answer(1.0, sent=1.0), answer(5.0, sent=2.0), Failure(3.0, 1.0, "boom")), 9.0)
    assert figures_of(run, ALL).peak_concurrency == 2


def test_short_and_uncounted_answers_are_told() -> None:
    run = Run((answer(1.0, 2.0, wanted=3), answer(1.0, 2.0, wanted=2)), 1.0)
    found = figures_of(run, ALL)
    assert (found.num_short, found.num_uncounted, found.cached_tokens) == (1, 0, None)
