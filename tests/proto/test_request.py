"""Sampling parameters: what is refused, and the one normal form of the rest."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.errors import InvalidRequest
from proto.ids import RequestId
from proto.request import MAX_CHOICES, Request, SamplingParams, derive_seed


def params(**fields: object) -> SamplingParams:
    return SamplingParams(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", MAX_CHOICES + 1),
        ("n", True),
        ("n", 1.0),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", "1"),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 1.1),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("seed", 1 << 64),
        ("seed", -(1 << 63) - 1),
        ("min_tokens", -1),
        ("max_tokens", 0),
        ("logprobs", -1),
        ("logprobs", 21),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("logit_bias", {5: 101.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {3: 10**400}),
        pytest.param("repetition_penalty", 10**400, id="repetition_penalty-of-401-digits"),
        ("stop_token_ids", [-1]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [True]),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        params(**{name: value}).checked()
    assert refused.value.param == name


@pytest.mark.parametrize("name", ["top_k", "max_tokens", "stop_token_ids", "logit_bias"])
def test_numbers_beyond_64_bits_are_the_client_s_mistake(name: str) -> None:
    value: object = 1 << 63
    if name == "stop_token_ids":
        value = [value]
    elif name == "logit_bias":
        value = {value: 1.0}
    with pytest.raises(InvalidRequest, match="between"):
        params(**{name: value}).checked()


def test_fields_that_contradict_each_other() -> None:
    with pytest.raises(InvalidRequest, match="must not exceed"):
        params(min_tokens=5, max_tokens=4).checked()
    with pytest.raises(InvalidRequest, match="temperature is 0"):
        params(n=2, temperature=0.0).checked()
    assert params(min_tokens=5, max_tokens=None).checked().min_tokens == 5


def test_the_limit_on_logprobs_is_the_caller_s() -> None:
    assert params(logprobs=50).checked(max_logprobs=50).logprobs == 50


def test_one_normal_form() -> None:
    normal = params(
        top_k=-1, seed=-2, stop="end", logit_bias={7: 1.0, 3: 2.0}, stop_token_ids=[], allowed_token_ids=[3, 1, 3]
    ).checked()
    assert normal.top_k == 0
    assert normal.seed == (1 << 64) - 2
    assert normal.stop == ("end",)
    assert normal.logit_bias == ((3, 2.0), (7, 1.0))
    assert normal.stop_token_ids is None
    assert normal.allowed_token_ids == (1, 3)
    assert normal.checked() == normal


def test_a_seed_of_minus_one_is_none() -> None:
    assert params(seed=-1).checked().seed is None
    assert params(seed=(1 << 64) - 1).checked().seed == (1 << 64) - 1


def test_greedy_is_a_temperature_of_nothing() -> None:
    assert params(temperature=0.0).is_greedy
    assert not params(temperature=0.01).is_greedy


@given(st.integers(0, (1 << 64) - 1))
def test_each_choice_has_a_seed_of_its_own(seed: int) -> None:
    seeds = [derive_seed(seed, choice) for choice in range(MAX_CHOICES)]
    assert seeds[0] == seed
    assert len(set(seeds)) == MAX_CHOICES
    assert all(0 <= each < 1 << 64 for each in seeds)


def test_seeds_stay_what_they_were() -> None:
    """A resumed request may be continued by another version."""
    assert [derive_seed(42, choice) for choice in range(3)] == [42, 13679457532755275413, 2949826092126892291]


def test_a_request_knows_whether_it_is_resumed() -> None:
    def request(forced: tuple[tuple[int, ...], ...]) -> Request:
        return Request(id=RequestId("r.1"), prompt=(1,), params=SamplingParams(n=2, seed=1), forced=forced)

    assert not request(()).is_resumed
    assert not request(((), ())).is_resumed
    assert request(((), (5,))).is_resumed
