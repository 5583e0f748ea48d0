"""Sampling: what each parameter does, in which order, and that a row is a pure function of its own inputs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.batch import Sampled, SampleSpec
from engine.sampler import Draw, sample
from proto.request import SamplingParams

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def make_spec(
    seed: int = 0, position: int = 0, prompt: Sequence[int] = (), output: Sequence[int] = (), **params: Any
) -> SampleSpec:
    suppressed = params.pop("suppressed", frozenset())
    return SampleSpec(0, seed, position, SamplingParams(**params).checked(), prompt, output, suppressed)


def one(logits: torch.Tensor, spec: SampleSpec) -> Sampled:
    return sample(logits[None], [Draw(0, spec)])[0]


def counts(logits: torch.Tensor, num: int = 4000, **params: Any) -> Counter[int]:
    draws = [Draw(0, make_spec(seed=seed, **params)) for seed in range(num)]
    return Counter(sampled.token for sampled in sample(logits[None], draws))


def greedy(logits: torch.Tensor = LOGITS, **params: Any) -> int:
    return one(logits, make_spec(temperature=0.0, **params)).token


def assert_follows(found: Counter[int], probabilities: torch.Tensor) -> None:
    total = found.total()
    for token, probability in enumerate(probabilities.tolist()):
        margin = 5 * math.sqrt(probability * (1 - probability) / total)
        assert abs(found[token] / total - probability) <= margin, f"token {token}: {found[token]} of {total}"


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    assert_follows(counts(LOGITS, temperature=temperature), (LOGITS / temperature).softmax(0))


def test_positions_of_one_seed_follow_the_softmax_too() -> None:
    draws = [Draw(0, make_spec(seed=5, position=position)) for position in range(4000)]
    assert_follows(Counter(s.token for s in sample(LOGITS[None], draws)), LOGITS.softmax(0))


def test_greedy_takes_the_first_of_equals() -> None:
    assert greedy() == 0
    assert greedy(torch.tensor([0.0, 3.0, 1.0, 3.0])) == 1


def test_top_k() -> None:
    kept = torch.where(torch.arange(6) < 2, LOGITS, -math.inf)
    assert_follows(counts(LOGITS, top_k=2), kept.softmax(0))
    assert set(counts(LOGITS, num=500, top_k=1)) == {0}
    assert_follows(counts(LOGITS, top_k=100), LOGITS.softmax(0))


def test_top_k_keeps_ties() -> None:
    assert set(counts(torch.tensor([1.0, 1.0, 1.0, 0.0]), num=500, top_k=2)) == {0, 1, 2}


def test_top_p_keeps_the_fewest_that_hold_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for top_p, number in ((0.4, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.96, 4), (1.0, 4)):
        kept = torch.where(torch.arange(4) < number, logits, -math.inf)
        assert_follows(counts(logits, num=2000, top_p=top_p), kept.softmax(0))


def test_top_p_counts_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert set(counts(logits, num=500, top_k=2, top_p=0.5)) == {0}  # 0.4 / 0.7 > 0.5


def test_min_p_is_relative_to_the_likeliest() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(counts(logits, num=1000, min_p=0.25)) == {0, 1, 2}
    assert set(counts(logits, num=1000, min_p=0.35)) == {0, 1}
    assert set(counts(logits, num=1000, min_p=0.35, temperature=2.0)) == {0, 1, 2}  # after temperature


def test_allowed_suppressed_and_bias() -> None:
    assert greedy(allowed_token_ids=[4, 5]) == 4
    assert greedy(suppressed=frozenset({0, 1})) == 2
    assert greedy(logit_bias={5: 6.0}) == 5
    assert greedy(logit_bias={5: 100.0}, allowed_token_ids=[1, 2]) == 1
    assert greedy(logit_bias={0: -1.5, 70: 5.0}) == 1  # an id beyond the vocabulary has no logit
    assert set(counts(LOGITS, num=300, allowed_token_ids=[3, 4])) == {3, 4}


def test_repetition_penalty_covers_prompt_and_output() -> None:
    assert greedy(repetition_penalty=3.0, prompt=[0, 0, 1]) == 0  # once, however often it occurs: 2 / 3 > 0.5
    assert greedy(repetition_penalty=5.0, prompt=[0], output=[1]) == 2
    negative = torch.tensor([-1.0, -1.5])
    assert greedy(negative, repetition_penalty=2.0, prompt=[0]) == 1


def test_presence_and_frequency_penalties_cover_output_alone() -> None:
    assert greedy(presence_penalty=1.5, prompt=[0, 0, 0]) == 0
    assert greedy(presence_penalty=1.5, output=[0, 0, 0]) == 1
    assert greedy(frequency_penalty=0.4, output=[0, 0]) == 0
    assert greedy(frequency_penalty=0.4, output=[0, 0, 0]) == 1
    assert greedy(frequency_penalty=-1.0, output=[3] * 3) == 3


def test_logprobs_are_of_the_raw_logits() -> None:
    found = one(LOGITS, make_spec(temperature=0.0, logprobs=3, allowed_token_ids=[4], logit_bias={4: 9.0})).logprobs
    expected = LOGITS.log_softmax(0)
    assert found is not None
    assert found.rank == 5
    assert found.logprob == pytest.approx(float(expected[4]))
    assert [token for token, _ in found.top] == [0, 1, 2]
    assert [value for _, value in found.top] == pytest.approx(expected[:3].tolist())


def test_logprobs_list_ties_by_id_and_may_be_empty() -> None:
    tied = torch.tensor([0.0, 1.0, 1.0, 1.0])
    found = one(tied, make_spec(temperature=0.0, logprobs=2)).logprobs
    assert found is not None
    assert [token for token, _ in found.top] == [1, 2]
    assert found.rank == 1
    alone = one(LOGITS, make_spec(temperature=0.0, logprobs=0)).logprobs
    assert alone is not None
    assert alone.top == ()
    assert one(LOGITS, make_spec(temperature=0.0)).logprobs is None


def all_kinds() -> list[SampleSpec]:
    text = [3, 50, 7, 3]
    return [
        make_spec(temperature=0.0),
        make_spec(seed=3, temperature=0.7, top_p=0.9, logprobs=5),
        make_spec(seed=4, position=9, top_k=20),
        make_spec(seed=5, min_p=0.05, temperature=1.3),
        make_spec(
            seed=6, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, prompt=text, output=text
        ),
        make_spec(seed=7, top_k=500, top_p=0.5, logit_bias={9: 3.0}, suppressed=frozenset({1, 2})),
        make_spec(seed=8, allowed_token_ids=list(range(100, 300)), logprobs=0),
        make_spec(seed=9),
    ]


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = torch.randn(8, 1003, generator=torch.Generator().manual_seed(1)) * 3
    specs = all_kinds()
    for shift in range(8):
        rows = [(index + shift) % 8 for index in range(8)]
        together = sample(logits, [Draw(row, spec) for row, spec in zip(rows, specs, strict=True)])
        alone = [one(logits[row], spec) for row, spec in zip(rows, specs, strict=True)]
        assert together == alone


def test_the_same_inputs_give_the_same_token_and_logits_stay_as_they_were() -> None:
    logits = torch.randn(8, 1003, generator=torch.Generator().manual_seed(2))
    before = logits.clone()
    draws = [Draw(row, spec) for row, spec in enumerate(all_kinds())]
    assert sample(logits, draws) == sample(logits, draws)
    assert torch.equal(logits, before)
    assert sample(logits, []) == []


def test_seed_and_position_both_matter() -> None:
    flat = torch.zeros(1, 5000)
    base = make_spec(seed=1, position=1)
    variants = [base, replace(base, position=2), replace(base, seed=2), replace(base, choice=1)]
    tokens = [s.token for s in sample(flat, [Draw(0, spec) for spec in variants])]
    assert tokens[0] == tokens[3]
    assert len(set(tokens[:3])) == 3
