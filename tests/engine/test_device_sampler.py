"""The sampler of devices against that of the CPU, over random parameters; and that it makes nobody wait."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.batch import Sampled, SampleSpec
from engine.device_sampler import sample_on_device
from engine.sampler import Draw, sample
from kernels import reference
from kernels.types import DrawRules
from proto.request import SamplingParams
from tests.support.no_waits import without_waits

VOCAB = 517
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

Kernel = Callable[[torch.Tensor, DrawRules], torch.Tensor]


@pytest.fixture(params=["torch", "triton"])
def draw(request: pytest.FixtureRequest) -> Kernel:
    if request.param == "torch":
        return reference.draw
    pytest.importorskip("triton")
    from kernels.triton import sampling

    return sampling.draw


def random_spec(dice: random.Random) -> SampleSpec:
    def some(*values: Any) -> Any:
        return dice.choice(values)

    def ids(most: int) -> list[int]:
        return [dice.randrange(VOCAB) for _ in range(dice.randrange(most))]

    params = SamplingParams(
        temperature=some(0.0, 0.0, 0.4, 1.0, 1.6),
        top_p=some(1.0, 1.0, 0.3, 0.9),
        top_k=some(0, 0, 1, 12, VOCAB + 9),
        min_p=some(0.0, 0.0, 0.1),
        presence_penalty=some(0.0, 0.0, 0.7, -0.5),
        frequency_penalty=some(0.0, 0.0, 0.3, -0.2),
        repetition_penalty=some(1.0, 1.0, 1.3, 0.8),
        logit_bias=some(None, None, {token: dice.uniform(-5, 5) for token in [*ids(20), VOCAB + 3]}),
        allowed_token_ids=some(None, None, None, [*ids(30), 7, VOCAB + 2]),
        logprobs=some(None, None, 0, 3, 20),
    )
    suppressed = frozenset(some([], [], [*ids(5), VOCAB + 1]))
    return SampleSpec(0, dice.getrandbits(64), dice.randrange(99), params.checked(), ids(60), ids(40), suppressed)


def assert_same(found: list[Sampled], expected: list[Sampled]) -> None:
    assert [each.token for each in found] == [each.token for each in expected]
    for one, other in zip(found, expected, strict=True):
        if one.logprobs is None or other.logprobs is None:
            assert one.logprobs is other.logprobs
            continue
        assert one.logprobs.rank == other.logprobs.rank
        assert one.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-5)
        assert [token for token, _ in one.logprobs.top] == [token for token, _ in other.logprobs.top]
        for (_, value), (_, expected_value) in zip(one.logprobs.top, other.logprobs.top, strict=True):
            assert value == pytest.approx(expected_value, abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_sampler_of_the_cpu(seed: int, draw: Kernel) -> None:
    dice = random.Random(seed)
    logits = torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    logits[::2] = (logits[::2] * 2).round() / 2  # ties, and both zeros
    draws = [Draw(dice.randrange(9), random_spec(dice)) for _ in range(24)]
    there = logits.to(DEVICE)
    found = sample_on_device(there, draws, draw).on_host()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert_same(found.sampled(draws), sample(logits, draws))
    assert torch.equal(there.cpu(), logits)


def test_a_token_that_is_still_being_drawn_counts_in_penalties(draw: Kernel) -> None:
    """Draws that follow the step before continue an output that the host does not know yet."""
    dice = random.Random(3)
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    known = [replace(random_spec(dice), output=[5, 5, 9, 200 + n], position=4) for n in range(6)]
    drawn = torch.tensor([200 + n for n in range(6)], device=DEVICE).flip(0)
    unknown = [replace(spec, output=[5, 5, 9]) for spec in known]
    expected = sample_on_device(logits, [Draw(n, spec) for n, spec in enumerate(known)], draw)
    following = [Draw(n, spec, follows=5 - n) for n, spec in enumerate(unknown)]
    found = sample_on_device(logits, following, draw, drawn)
    assert found.tokens.tolist() == expected.tokens.tolist()
    boosted = SamplingParams(temperature=0.0, frequency_penalty=-2.0, presence_penalty=-2.0).checked()
    forced = [Draw(0, SampleSpec(0, 0, 1, boosted, (), ()), follows=2)]
    flat = torch.zeros(1, VOCAB, device=DEVICE)
    assert sample_on_device(flat, forced, draw, drawn).tokens.tolist() == [203]


def test_makes_the_host_wait_for_nothing() -> None:
    dice = random.Random(4)
    logits = torch.randn(30, VOCAB, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    draws = [Draw(n, random_spec(dice), follows=n if n % 2 else None) for n in range(30)]
    drawn = torch.arange(30, device=DEVICE)
    without_waits(lambda: sample_on_device(logits, draws, reference.draw, drawn).on_host())


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_torch_itself_sees_no_wait(draw: Kernel) -> None:
    dice = random.Random(5)
    logits = torch.randn(30, VOCAB, device=DEVICE)
    draws = [Draw(n, random_spec(dice)) for n in range(30)]
    sample_on_device(logits, draws, draw)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample_on_device(logits, draws, draw).on_host()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_batch_invariant_log_probabilities_have_the_same_bits_alone_and_beside_others() -> None:
    """Over a vocabulary so large that torch may cut a row's sum up, by how many rows there are."""
    generator = torch.Generator().manual_seed(3)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    params = SamplingParams(temperature=0.0, seed=0, logprobs=2).checked()
    spec = SampleSpec(0, 0, 0, params, (), ())
    try:
        for _ in range(12):
            logits = (torch.randn(8, 128_256, generator=generator) * 3).to(DEVICE)
            together = logprobs_of(logits, spec)
            alone = [logprobs_of(logits[row : row + 1], spec)[0] for row in range(8)]
            assert together == alone
    finally:
        torch.set_num_threads(threads)


def logprobs_of(logits: torch.Tensor, spec: SampleSpec) -> list[Sampled]:
    draws = [Draw(row, spec) for row in range(logits.shape[0])]
    drawn = sample_on_device(logits, draws, reference.draw, is_batch_invariant=True).on_host()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return drawn.sampled(draws)
