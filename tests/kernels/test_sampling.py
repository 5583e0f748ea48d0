"""Draws in Triton against their twin in plain torch. Without a GPU they are interpreted."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import torch

from kernels import noise, reference
from kernels.types import DrawRules

pytest.importorskip("triton")
import triton
import triton.language as tl

from kernels.triton import sampling, sampling_kernels
from tests.support.launches import Launches

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# numpy tells of 32-bit products that wrap around, as they should.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def make_rules(rows: int, **given: list[float]) -> DrawRules:
    rules = {"temperature": [1.0] * rows, "min_p": [0.0] * rows, "top_k": [0] * rows, "top_p": [1.0] * rows}
    return DrawRules(**{**rules, **given}, keys=[noise.draw_key(5, row) for row in range(rows)])  # type: ignore[arg-type]


def random_rules(rows: int, vocab_size: int, seed: int) -> DrawRules:
    dice = random.Random(seed)
    return DrawRules(
        temperature=[dice.choice([0.0, 0.0, 0.3, 1.0, 1.7]) for _ in range(rows)],
        min_p=[dice.choice([0.0, 0.0, 0.02, 0.3, 1.0]) for _ in range(rows)],
        top_k=[dice.choice([0, 0, 1, 7, vocab_size - 1, vocab_size, vocab_size + 3]) for _ in range(rows)],
        top_p=[dice.choice([1.0, 1.0, 0.05, 0.6, 0.95]) for _ in range(rows)],
        keys=[noise.draw_key(dice.getrandbits(64), dice.randrange(1000)) for _ in range(rows)],
    )


@pytest.mark.parametrize("vocab_size", [2, 50, 4096, 9001])
def test_draws_are_those_of_the_reference(vocab_size: int) -> None:
    rows = 12
    generator = torch.Generator().manual_seed(vocab_size)
    scores = (torch.randn(rows, vocab_size + 5, generator=generator) * 3).to(DEVICE)[:, :vocab_size]
    scores[::3] = scores[::3].round()  # many ties
    scores[1::7, ::2] = -math.inf
    before = scores.clone()
    for seed in range(2):
        rules = random_rules(rows, vocab_size, seed)
        found = sampling.draw(scores, rules)
        assert found.tolist() == reference.draw(scores.clone(), rules).tolist()
        assert torch.equal(scores, before)


@pytest.mark.parametrize("vocab_size", [300, 5000])
def test_cuts_are_exact(vocab_size: int) -> None:
    """The threshold itself, of cuts alone and together, against sorted scores."""
    scores = torch.randn(8, vocab_size, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 2
    scores[6:] = scores[6:].round() - 0.0
    rules = make_rules(
        8,
        temperature=[0.7] * 8,
        min_p=[0, 0, 0, 0.1, 0, 0.1, 0, 0.1],
        top_k=[0, 40, 0, 0, 40, 40, 40, 3],
        top_p=[1, 1, 0.8, 1, 0.8, 0.8, 0.8, 0.8],
    )
    temperatures = torch.full((8,), 0.7, device=DEVICE)
    found = sampling._thresholds(scores, temperatures, rules)
    scaled = scores / temperatures[:, None]
    for row in range(8):
        x = scaled[row].sort(descending=True).values
        expected = -math.inf
        if rules.min_p[row]:
            expected = float(x[0] + math.log(rules.min_p[row]))
        x = x[x >= expected]
        if rules.top_k[row]:
            x = x[x >= x[min(rules.top_k[row], len(x)) - 1]]
        if rules.top_p[row] < 1:
            mass = x.double().softmax(0)
            x = x[: int((mass.cumsum(0) - mass < rules.top_p[row]).sum())]
        if rules.top_k[row] or rules.top_p[row] < 1:
            expected = max(expected, float(x[-1]))
        assert found[row] == pytest.approx(expected, rel=1e-6)
        assert torch.equal(scaled[row] >= found[row], scaled[row] >= expected - 1e-6)


def test_one_program_cuts_for_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Launches()
    monkeypatch.setattr(sampling, "sampling_kernels", SimpleNamespace(cut=cut))
    for rows in range(1, 10):
        sampling._thresholds(torch.zeros(rows, 8), torch.ones(rows), make_rules(rows, top_k=[2.0] * rows))
    assert len(cut.tensors) == 9
    assert cut.are_aligned


def test_nothing_left_is_token_0_and_equals_are_the_first() -> None:
    scores = torch.full((3, 9000), -math.inf, device=DEVICE)
    scores[2, 8500:] = 1.0
    rules = make_rules(3, temperature=[0.0, 0.8, 0.0], top_k=[0, 3, 0], top_p=[1.0, 0.9, 1.0], min_p=[0.0, 0.1, 0.0])
    assert sampling.draw(scores, rules).tolist() == [0, 0, 8500]


@triton.jit
def _noise(out, low, high, BLOCK: tl.constexpr):
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + tokens, sampling_kernels._gumbel(tokens, tl.load(low).to(tl.uint32), tl.load(high).to(tl.uint32)))


@triton.jit
def _bits(out, low, high, BLOCK: tl.constexpr):
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = sampling_kernels._mix(tokens.to(tl.uint32) * 0x9E3779B1 + tl.load(low).to(tl.uint32))
    h = sampling_kernels._mix(h ^ tl.load(high).to(tl.uint32))
    tl.store(out + tokens, h.to(tl.int64))


@pytest.mark.parametrize("key", [0, noise.draw_key(1, 2), (1 << 64) - 1, 0x8000_0000_0000_0001])
def test_noise_is_that_of_the_definition(key: int) -> None:
    low, high = (torch.tensor([part], dtype=torch.int64, device=DEVICE) for part in (key & 0xFFFFFFFF, key >> 32))
    vocab_size = 30 * 1024
    found = torch.empty(vocab_size, device=DEVICE)
    _noise[(30,)](found, low, high, BLOCK=1024)
    expected = noise.gumbel([key], vocab_size, torch.device("cpu"))[0]
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6)
    bits = torch.empty(vocab_size, dtype=torch.int64, device=DEVICE)
    _bits[(30,)](bits, low, high, BLOCK=1024)
    assert bits.tolist() == [slow_bits(key, token) for token in range(vocab_size)]


def slow_bits(key: int, token: int) -> int:
    def mix(h: int) -> int:
        h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        return h ^ h >> 16

    return mix(mix(token * 0x9E3779B1 + key & 0xFFFFFFFF) ^ key >> 32)
