"""Products with quantised matrices by Triton against their twins in plain torch, and what the twins' numbers are.

Without a GPU the kernels are interpreted, with few and small shapes; float32 and float16 products are then real ones,
and bfloat16 and fp8 ones are computed in float32.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.quantised import FP8, CodedMatrix, Matrix, ScaledMatrix, fuse, pack, unpack
from kernels.reference import linear
from kernels.reference import quantised as twins

pytest.importorskip("triton")

from kernels.triton import quantised as compiled
from kernels.triton.quantised import TritonQuantised
from kernels.triton.runtime import Target

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
NUM_SMS = torch.cuda.get_device_properties(DEVICE).multi_processor_count if HAS_GPU else 4
HAS_FP8 = not HAS_GPU or torch.cuda.get_device_capability(DEVICE) >= (8, 9)


def maker(
    dtype: torch.dtype, *, num_sms: int = NUM_SMS, fp8: bool = HAS_FP8, invariant: bool = False
) -> TritonQuantised:
    return TritonQuantised(Target(num_sms, not HAS_GPU, fp8), dtype, linear, invariant)


def numbers(*shape: int, seed: int = 0, spread: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator)
    if spread:  # rows of very different sizes: a scale in a wrong place shows
        drawn *= torch.logspace(-2, 2, shape[0])[:, None]
    return drawn.to(DEVICE)


def coded(
    rows: int, columns: int, *, bits: int, group: int, zero: bool = True, shuffled: bool = False, dtype: torch.dtype
) -> CodedMatrix:
    generator = torch.Generator().manual_seed(rows + columns)
    groups = -(-columns // group)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8).to(DEVICE)
    zeros = torch.randint(0, 1 << bits, (groups, rows), generator=generator, dtype=torch.uint8).to(DEVICE)
    scale = (torch.rand((groups, rows), generator=generator) * 0.1 + 0.01).to(DEVICE, dtype)
    order = torch.randperm(columns, generator=generator).to(DEVICE) if shuffled else None
    packed = pack(codes) if bits == 4 else codes
    return CodedMatrix(packed, bits, columns, scale, group, zeros if zero else None, order=order)


def scaled(rows: int, columns: int, dtype: torch.dtype, *, blocks: bool = False, inputs: bool = False) -> ScaledMatrix:
    """With ``inputs`` they are quantised, too, where the device can."""
    bears = inputs and (HAS_FP8 or dtype == torch.int8)
    matrix = twins.quantise_rows(numbers(rows, columns, spread=True), dtype, quantises_inputs=bears)
    if not blocks:
        return matrix
    scale = torch.rand(-(-rows // 128), -(-columns // 128), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return replace(matrix, scale=scale, rows_per_scale=128, columns_per_scale=128)


def check(matrix: Matrix, tokens: int, how: TritonQuantised, *, bias: bool = False, strided: bool = False) -> None:
    rows, columns = matrix.shape
    x = numbers(tokens, columns * 2 if strided else columns, seed=tokens).to(how.dtype)
    x = x[:, :columns] if strided else x
    offset = numbers(rows, 1, seed=5)[:, 0].to(how.dtype) if bias else None
    compare([matrix], offset, x, how)


def compare(parts: list[Matrix], bias: Tensor | None, x: Tensor, how: TritonQuantised) -> None:
    """Errors are measured against the sum of all terms' sizes."""
    found, wanted = how.linear(parts, bias)(x), twins.linear(parts, bias)(x)
    assert found.dtype == x.dtype == how.dtype
    weight = torch.cat([twins.dequantise(part, torch.float32) for part in parts])
    size = x.float().abs() @ weight.abs().T + (0 if bias is None else bias.float().abs())
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[how.dtype]
    assert ((found.float() - wanted.float()).abs() <= tolerance * size + 1e-6).all()


# --- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 31, 64, 65, 200])
def test_four_bits_are_packed_and_unpacked(columns: int) -> None:
    codes = torch.randint(0, 16, (5, columns), dtype=torch.uint8)
    packed = pack(codes)
    assert packed.shape == (5, -(-columns // 64) * 32)
    assert torch.equal(unpack(packed, columns), codes)
    assert int(packed[0, 0]) & 15 == int(codes[0, 0])


# --- what the numbers are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "step"), [(FP8, 2**-4), (torch.int8, 0.5 / 127)])
@pytest.mark.parametrize("shape", [(3, 5), (130, 64), (260, 200)])
def test_rounding_rows_is_off_by_half_a_step_at_most(dtype: torch.dtype, step: float, shape: tuple[int, int]) -> None:
    weight = numbers(*shape, spread=True)
    weight[1] = 0
    matrix = twins.quantise_rows(weight, dtype, quantises_inputs=False)
    largest = weight.abs().amax(1, keepdim=True)
    error = (twins.dequantise(matrix, torch.float32) - weight).abs()
    bound = torch.maximum(weight.abs(), largest * 2**-13) if dtype == FP8 else largest
    assert (error <= bound * step * 1.001).all()
    assert torch.equal(twins.dequantise(matrix, torch.float32)[1], weight[1])


@pytest.mark.parametrize("shape", [(3, 64), (130, 100), (5, 7)])
def test_nf4_is_the_nearest_of_its_sixteen_numbers(shape: tuple[int, int]) -> None:
    weight = numbers(*shape, spread=True)
    weight[1] = 0
    matrix = twins.quantise_nf4(weight)
    table = torch.tensor(twins.NF4, device=DEVICE)
    found = twins.dequantise(matrix, torch.float32)
    for first in range(0, shape[1], 64):
        part = weight[:, first : first + 64]
        largest = part.abs().amax(1, keepdim=True)
        nearest = (part[:, :, None] - table * largest[:, :, None]).abs().amin(-1)
        error = (found[:, first : first + 64] - part).abs()
        torch.testing.assert_close(error, nearest, rtol=1e-5, atol=1e-6)


def test_widening_in_parts_is_widening_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices: list[Matrix] = [
        scaled(300, 130, FP8, blocks=True),
        coded(300, 128, bits=4, group=32, shuffled=True, dtype=torch.float16),
        twins.quantise_nf4(numbers(300, 130)),
    ]
    whole = [twins.dequantise(matrix, torch.float32) for matrix in matrices]
    monkeypatch.setattr(twins, "_AT_ONCE", 128 * 128)
    for matrix, wanted in zip(matrices, whole, strict=True):
        assert torch.equal(twins.dequantise(matrix, torch.float32), wanted)


def test_alike_parts_are_fused_and_others_are_not() -> None:
    fp8, int8 = scaled(128, 64, FP8), scaled(64, 64, torch.int8)
    four = coded(32, 64, bits=4, group=32, dtype=torch.float16)
    shuffled = coded(32, 64, bits=4, group=32, shuffled=True, dtype=torch.float16)
    plain = numbers(8, 64)
    parts: list[Matrix] = [fp8, fp8, int8, plain, plain, four, four, shuffled, shuffled, replace(four, zero=None)]
    fused = fuse(parts)
    assert [matrix.shape[0] for matrix in fused] == [256, 64, 16, 64, 64, 32]
    separate = torch.cat([twins.dequantise(part, torch.float32) for part in parts])
    assert torch.equal(torch.cat([twins.dequantise(part, torch.float32) for part in fused]), separate)


def test_blocks_are_fused_where_they_end_and_input_scales_become_the_largest() -> None:
    whole, cut = scaled(256, 128, FP8, blocks=True), scaled(130, 128, FP8, blocks=True)
    assert [matrix.shape[0] for matrix in fuse([whole, cut, whole])] == [386, 256]
    fixed = [replace(scaled(64, 64, FP8), input_scale=torch.tensor(scale)) for scale in (0.5, 2.0, 1.0)]
    [fused] = fuse(fixed)
    assert isinstance(fused, ScaledMatrix)
    assert fused.input_scale == 2


# --- the kernels -----------------------------------------------------------------------------------------------------

TYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("values", [FP8, torch.int8])
@pytest.mark.parametrize("inputs", [False, True])
def test_scaled(dtype: torch.dtype, values: torch.dtype, inputs: bool) -> None:
    check(scaled(70, 160, values, inputs=inputs), 5, maker(dtype), bias=True, strided=True)


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("shape", [(192, 320), (64, 100)])
def test_scaled_in_blocks(inputs: bool, shape: tuple[int, int]) -> None:
    check(scaled(*shape, FP8, blocks=True, inputs=inputs), 3, maker(torch.bfloat16))
    check(scaled(*shape, FP8, blocks=True, inputs=inputs), 130, maker(torch.float16), bias=True)


def test_a_fixed_input_scale_clamps() -> None:
    for values in (FP8, torch.int8):
        matrix = replace(scaled(64, 64, values, inputs=True), input_scale=torch.tensor(0.004, device=DEVICE))
        check(matrix, 4, maker(torch.float16))


@pytest.mark.parametrize("dtype", TYPES)
def test_without_an_fp8_unit_bytes_are_widened_by_hand(dtype: torch.dtype) -> None:
    """Every number of fp8 (but the two that are none), its smallest ones among them."""
    stored = torch.arange(256, dtype=torch.uint8).view(8, 32)
    stored[stored & 127 == 127] = 0
    matrix = ScaledMatrix(stored.view(FP8).to(DEVICE), torch.ones(8, 1, device=DEVICE), 1, 32, quantises_inputs=True)
    how = maker(dtype, fp8=False)
    found = how.linear([matrix], None)(torch.eye(32, dtype=dtype, device=DEVICE))
    assert torch.equal(found.T.float(), stored.view(FP8).float().to(DEVICE))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("bits", "group", "zero", "shuffled"),
    [
        *((4, 32, True, False), (4, 64, False, True), (4, 128, True, False), (4, 999, True, False)),
        *((8, 32, True, True), (8, 999, False, False), (8, 16, True, False)),
    ],
)
def test_coded(dtype: torch.dtype, bits: int, group: int, zero: bool, shuffled: bool) -> None:
    matrix = coded(70, 192, bits=bits, group=group, zero=zero, shuffled=shuffled, dtype=torch.float16)
    check(matrix, 5, maker(dtype), bias=zero, strided=True)


@pytest.mark.parametrize("columns", [100, 128])
def test_nf4(columns: int) -> None:
    check(twins.quantise_nf4(numbers(70, columns, spread=True).half()), 4, maker(torch.float16), bias=True)


def test_groups_that_no_tile_fits_are_multiplied_plain() -> None:
    for bits, group in ((4, 48), (8, 24)):
        matrix = coded(40, 96, bits=bits, group=group, dtype=torch.float32)
        assert not compiled.coded_depth(matrix)
        check(matrix, 3, maker(torch.float32))


@pytest.mark.parametrize("seed", range(6 if not HAS_GPU else 60))
def test_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    rows, columns = rng.randint(1, 300), rng.randint(1, 300)
    tokens, dtype = rng.choice([1, 2, 17, 65, 140]), rng.choice(TYPES)
    how = maker(dtype, num_sms=rng.choice([1, 40, 400]), invariant=rng.random() < 0.3)
    kinds: list[Matrix] = [
        scaled(rows, columns, rng.choice([FP8, torch.int8]), inputs=rng.random() < 0.5),
        scaled(rows, columns, FP8, blocks=True, inputs=rng.random() < 0.5),
        coded(rows, columns, bits=rng.choice([4, 8]), group=rng.choice([32, 64, 128, 999]), dtype=torch.bfloat16),
        twins.quantise_nf4(numbers(rows, columns, seed=seed)),
    ]
    check(rng.choice(kinds), tokens, how, bias=rng.random() < 0.5, strided=rng.random() < 0.5)


@pytest.mark.parametrize("kind", ["scaled", "blocks", "coded"])
def test_splits_add_up(kind: str) -> None:
    """Few rows on a device of many processors: the columns are shared out."""
    columns = 2048
    matrix: Matrix = coded(32, columns, bits=4, group=128, dtype=torch.float16)
    if kind != "coded":
        matrix = scaled(32, columns, FP8, blocks=kind == "blocks", inputs=True)
    assert maker(torch.float16, num_sms=400).splits(1, columns // 128) > 1
    for bias in (False, True):
        check(matrix, 2, maker(torch.float16, num_sms=400), bias=bias)


def test_no_tokens_give_no_results() -> None:
    """A step whose rows sample nothing."""
    for matrix in (scaled(40, 64, FP8, inputs=True), coded(40, 64, bits=4, group=32, dtype=torch.float16)):
        assert maker(torch.float16).linear([matrix], None)(numbers(0, 64).half()).shape == (0, 40)


def test_stacked_parts_of_every_kind() -> None:
    parts: list[Matrix] = [
        scaled(40, 128, FP8, inputs=True),
        coded(24, 128, bits=4, group=32, dtype=torch.float16),
        numbers(16, 128).half(),
    ]
    x, bias = numbers(3, 128).half(), numbers(80, 1)[:, 0].half()
    compare(parts, bias, x, maker(torch.float16))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("values", [FP8, torch.int8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("fixed", [None, 0.02])
def test_what_is_not_finite_stays_so_and_in_its_row(values: torch.dtype, bad: float, fixed: float | None) -> None:
    """A wrong number must not become a plausible one by rounding."""
    scale = None if fixed is None else torch.tensor(fixed, device=DEVICE)
    matrix = replace(scaled(40, 64, values, inputs=True), input_scale=scale)
    x = numbers(3, 64).half()
    clean = maker(torch.float16).linear([matrix], None)(x)
    x[1, 7] = bad
    found = maker(torch.float16).linear([matrix], None)(x)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
    assert not twins.linear([matrix], None)(x)[1].isfinite().any()


@pytest.mark.parametrize("inputs", [False, True])
def test_batch_invariant_products_have_the_same_bits_alone(inputs: bool) -> None:
    how = maker(torch.float16, num_sms=400, invariant=True)
    for matrix in (scaled(40, 512, FP8, inputs=inputs), coded(40, 512, bits=4, group=64, dtype=torch.float16)):
        product = how.linear([matrix], None)
        x = numbers(70, 512).half()
        together = product(x)
        for token in (0, 33, 69):
            assert torch.equal(product(x[token : token + 1])[0], together[token])
