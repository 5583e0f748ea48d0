"""The counter-based noise: exact integers, the right distribution, and nothing but its key in it."""

from __future__ import annotations

import math

import torch

from kernels import noise

CPU = torch.device("cpu")
MASK = 0xFFFFFFFF


def slow_mix(h: int) -> int:
    h ^= h >> 16
    h = h * 0x85EBCA6B & MASK
    h ^= h >> 13
    h = h * 0xC2B2AE35 & MASK
    return h ^ h >> 16


def slow_gumbel(key: int, token: int) -> float:
    h = slow_mix((token * 0x9E3779B1 + (key & MASK)) & MASK)
    h = slow_mix(h ^ key >> 32)
    return -math.log(-math.log1p(-min((h + 0.5) / 2**32, 1 - 2**-24)))


def test_equals_the_definition() -> None:
    keys = [noise.draw_key(seed, position) for seed, position in ((0, 0), (1, 0), (2**64 - 1, 77), (12345, 3))]
    out = noise.gumbel(keys, 2000, CPU)
    expected = torch.tensor([[slow_gumbel(key, token) for token in range(2000)] for key in keys])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_keys_of_near_seeds_and_positions_differ() -> None:
    keys = {noise.draw_key(seed, position) for seed in range(64) for position in range(64)}
    assert len(keys) == 64 * 64
    assert noise.draw_key(-1, 5) == noise.draw_key(2**64 - 1, 5)


def test_a_row_depends_on_its_key_alone() -> None:
    keys = [noise.draw_key(9, position) for position in range(5)]
    together = noise.gumbel(keys, 1003, CPU)
    for row, key in enumerate(keys):
        assert torch.equal(together[row], noise.gumbel([key], 1003, CPU)[0])
        assert torch.equal(together[row][:17], noise.gumbel([key], 17, CPU)[0])


def test_is_gumbel_distributed() -> None:
    out = noise.gumbel([noise.draw_key(seed, 0) for seed in range(40)], 25_000, CPU).double().flatten()
    assert torch.isfinite(out).all()
    assert abs(float(out.mean()) - 0.5772157) < 0.005
    assert abs(float(out.var()) - math.pi**2 / 6) < 0.02
    for quantile in (0.001, 0.1, 0.5, 0.9, 0.999):
        share = float((out < -math.log(-math.log(quantile))).double().mean())
        assert abs(share - quantile) < 5 * math.sqrt(quantile * (1 - quantile) / out.numel())


def test_draws_along_a_sequence_are_independent() -> None:
    """Correlation between neighbouring positions, and between neighbouring tokens, of the same seed."""
    out = noise.gumbel([noise.draw_key(3, position) for position in range(200)], 2000, CPU).double()
    out = (out - out.mean()) / out.std()
    assert abs(float((out[1:] * out[:-1]).mean())) < 0.01
    assert abs(float((out[:, 1:] * out[:, :-1]).mean())) < 0.01
