"""The fused kernels in Triton against their twins in plain torch, over shapes, types and strides.

Without a GPU they are interpreted, and the interpreter rounds in its own way: float32 becomes bfloat16 by cutting bits
off, and fp8 by an addition whose carry is lost, so that a number just below a power of two is halved.
"""

from __future__ import annotations

import random
from math import prod

import pytest
import torch

from kernels import reference
from kernels.types import HeadNorm, PagedKv, Places

pytest.importorskip("triton")
from kernels.triton import fused

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IS_INTERPRETED = DEVICE.type == "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# numpy tells of an exponential that is infinite, as those of the range's ends should be.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def padded(dice: random.Random, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers within a larger tensor: each dimension begins somewhere and ends before its end."""
    before, behind = ([dice.randrange(9) for _ in shape] for _ in range(2))
    whole = randn(*map(sum, zip(shape, before, behind, strict=True)), dtype=dtype, seed=dice.randrange(1000))
    return whole[tuple(slice(start, start + size) for start, size in zip(before, shape, strict=True))]


def close(found: torch.Tensor, expected: torch.Tensor, rounded_to: torch.dtype | None = None) -> None:
    """Equal up to one rounding of the stored type: a root or an exponential may differ in its last bit."""
    assert found.dtype == expected.dtype
    eps = torch.finfo(found.dtype).eps
    if IS_INTERPRETED and torch.bfloat16 in (found.dtype, rounded_to):
        eps = 4 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(found, expected, rtol=max(eps, 2e-6), atol=max(eps, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "n"), [(1, 64), (3, 1000), (5, 4096), (0, 32)])
def test_add_norm(tokens: int, n: int, dtype: torch.dtype) -> None:
    wide, residual, weight = (
        randn(tokens, n + 8, dtype=dtype),
        randn(tokens, n, dtype=dtype, seed=1),
        randn(n).to(dtype),
    )
    x = wide[:, 8:]
    assert x.stride(0) == n + 8
    normed, total = fused.add_norm(x, residual, weight, 1e-5)
    expected, sum_of_both = reference.add_norm(x, residual, weight, 1e-5)
    close(total, sum_of_both)
    close(normed, expected)
    normed, total = fused.add_norm(x, None, weight, 1e-5)
    close(normed, reference.add_norm(x, None, weight, 1e-5)[0])
    assert total is x


@pytest.mark.parametrize("seed", range(4))
def test_norms_and_gates_of_random_shapes_and_strides(seed: int) -> None:
    dice = random.Random(seed)
    dtype, tokens, n = dice.choice(DTYPES), dice.randrange(1, 6), dice.randrange(1, 1500)
    x, residual = padded(dice, tokens, n, dtype=dtype), padded(dice, tokens, n, dtype=dtype)
    weight = randn(n, dtype=dtype, seed=seed)
    normed, total = fused.add_norm(x, residual, weight, 1e-5)
    expected, sum_of_both = reference.add_norm(x, residual, weight, 1e-5)
    close(total, sum_of_both)
    close(normed, expected)
    pairs, activation = padded(dice, tokens, 2 * n, dtype=dtype), dice.choice(sorted(reference.ACTIVATIONS))
    close(fused.gate(pairs, activation), reference.gate(pairs, activation))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 64), (1, 1, 20), (14, 2, 96)])
def test_rotate_and_write(
    heads: int, kv_heads: int, head_dim: int, is_fp8: bool, has_norm: bool, dtype: torch.dtype
) -> None:
    tokens, block_size, layer = 5, 4, 1
    qkv = randn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype) * 3
    qkv[3, heads] = 0  # a key of zeros has no scale
    norm = HeadNorm(randn(heads + kv_heads, head_dim, dtype=dtype, seed=2), 1e-5) if has_norm else None
    blocks, offsets = torch.tensor([[3, 0, 0, 5, 2], [3, 0, 1, 2, 1]], device=DEVICE)
    places = Places(*randn(2, tokens, 1, head_dim, seed=3), blocks, offsets)
    same_rotation(qkv, norm, places, (6, 3, 2, block_size, kv_heads, head_dim), layer, is_fp8=is_fp8)


def test_an_fp8_key_that_is_no_number_in_one_place_is_none_in_all() -> None:
    qkv = randn(3, 4, 20, dtype=torch.bfloat16)
    blocks, offsets = torch.tensor([[0, 0, 1], [0, 1, 0]], device=DEVICE)
    places = Places(*randn(2, 3, 1, 20, seed=3), blocks, offsets)

    def write() -> torch.Tensor:
        data = torch.zeros(2, 1, 2, 4, 1, 20, device=DEVICE).to(torch.float8_e4m3fn)
        kv = PagedKv(data, torch.zeros(2, 1, 2, 1, 4, device=DEVICE))
        fused.rotate_and_write(qkv, None, places, kv, 0)
        return reference.widen_kv(kv, 0, torch.arange(2, device=DEVICE))

    clean = write()
    qkv[1, 2, 5] = torch.nan
    found = write()
    assert not found[0, 0, 1].isfinite().any()
    found[0, 0, 1] = clean[0, 0, 1]
    assert torch.equal(found, clean)


def same_rotation(
    qkv: torch.Tensor, norm: HeadNorm | None, places: Places, shape: tuple[int, ...], layer: int, *, is_fp8: bool
) -> None:
    """``shape``: of the memory, ``[blocks, layers, 2, block_size, kv_heads, head_dim]``."""
    dtype, blocks, offsets = qkv.dtype, places.blocks, places.offsets

    def memory() -> PagedKv:
        stored = torch.float8_e4m3fn if is_fp8 else dtype
        # Blocks lie apart, as in regions that hold scales behind the numbers.
        data = torch.zeros(shape[0], prod(shape[1:]) + 16, device=DEVICE).to(stored)[:, 16:]
        scales = torch.zeros(*shape[:3], shape[4], shape[3], device=DEVICE) if is_fp8 else None
        return PagedKv(data.view(shape), scales)

    here, there = memory(), memory()
    query = fused.rotate_and_write(qkv, norm, places, here, layer)
    expected = reference.rotate_and_write(qkv, norm, places, there, layer)
    close(query, expected)
    if is_fp8:
        assert here.scales is not None
        assert there.scales is not None
        close(here.scales, there.scales, rounded_to=dtype)
        found, wanted = (reference.widen_kv(kv, layer, torch.arange(shape[0], device=DEVICE)) for kv in (here, there))
        # A few numbers lie so near the middle of two of fp8's that a last bit decides.
        off = (found - wanted).abs() > 0.02 * wanted.abs()
        assert off.float().mean() <= (0.02 if IS_INTERPRETED else 0.002)
        step = 0.5 if IS_INTERPRETED else 2**-3
        assert ((found - wanted).abs() <= (step + 0.01) * wanted.abs() + 1e-2).all()
    else:
        close(here.data, there.data)
    for kv in (here, there):  # nothing else is touched
        written = kv.data.view(torch.uint8) if is_fp8 else kv.data
        written[:, layer][blocks, :, offsets] = 0
        assert not written.any()


@pytest.mark.parametrize("seed", range(4))
def test_rotations_of_random_shapes_and_strides(seed: int) -> None:
    dice = random.Random(seed)
    dtype, is_fp8 = dice.choice(DTYPES), dice.random() < 0.5
    tokens, kv_heads, head_dim = dice.randrange(1, 6), dice.randrange(1, 3), 4 * dice.randrange(1, 15)
    heads = kv_heads * dice.randrange(1, 6)
    qkv = padded(dice, tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    norm = HeadNorm(randn(heads + kv_heads, head_dim, dtype=dtype, seed=seed), 1e-5) if dice.random() < 0.5 else None
    num_blocks, layers, block_size = dice.randrange(2, 7), dice.randrange(1, 4), dice.randrange(3, 9)
    slots = torch.tensor(dice.sample(range(num_blocks * block_size), tokens), device=DEVICE)
    places = Places(*randn(2, tokens, 1, head_dim, seed=seed + 9), slots // block_size, slots % block_size)
    shape = (num_blocks, layers, 2, block_size, kv_heads, head_dim)
    same_rotation(qkv, norm, places, shape, dice.randrange(layers), is_fp8=is_fp8)


def test_heads_that_are_not_normed_or_turned_are_stored_as_they_are() -> None:
    qkv = randn(2, 4, 32, dtype=torch.bfloat16)
    slots = torch.tensor([0, 1], device=DEVICE)
    places = Places(*randn(2, 2, 1, 32), slots, slots)
    kv = PagedKv(torch.zeros(2, 1, 2, 2, 1, 32, dtype=torch.bfloat16, device=DEVICE))
    fused.rotate_and_write(qkv, HeadNorm(randn(3, 32, dtype=torch.bfloat16), 1e-5), places, kv, 0)
    assert torch.equal(kv.data[slots, 0, 1, slots, 0], qkv[:, 3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
@pytest.mark.parametrize(("tokens", "inner"), [(1, 8), (3, 1500), (0, 4)])
def test_gate(tokens: int, inner: int, activation: str, dtype: torch.dtype) -> None:
    x = (randn(tokens, 2 * inner + 3, dtype=dtype) * 3)[:, 3:]
    close(fused.gate(x, activation), reference.gate(x, activation))


@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_gate_at_the_ends_of_the_range(activation: str) -> None:
    left = torch.tensor([[-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, 1.0]], device=DEVICE)
    found = fused.gate(torch.cat((left, torch.ones_like(left)), 1), activation)
    expected = reference.ACTIVATIONS[activation](left.double()).float()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
