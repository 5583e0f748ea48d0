"""Matrices in fewer bits in plain torch: how numbers are rounded to them, what they stand for, and their products.

Rounding and ``dequantise`` run on any device, when weights are loaded. The products are the oracle of compiled ones;
where there are none, an engine multiplies by dequantised weights instead. Sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.quantised import FP8, CodedMatrix, Matrix, Product, ScaledMatrix, Stacked, pack, stack, unpack

LARGEST = {FP8: 448.0, torch.int8: 127.0}
"""The largest number of a type, which the largest of what shares a scale becomes."""

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 numbers of NormalFloat4 (QLoRA, https://arxiv.org/abs/2305.14314, appendix E)."""

_AT_ONCE = 1 << 20
"""Numbers of a matrix that are widened at once: few enough for a cache, and so that loading takes little beside its
result."""


def quantise_rows(weight: Tensor, dtype: torch.dtype, *, quantises_inputs: bool) -> ScaledMatrix:
    """``weight [out, in]`` as float8_e4m3fn or int8, one scale per row."""
    values = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scale = torch.empty((weight.shape[0], 1), device=weight.device)
    for first, end in _spans(*weight.shape):
        values[first:end], scale[first:end] = _round(weight[first:end].float(), dtype)
    return ScaledMatrix(values, scale, 1, weight.shape[1], quantises_inputs)


def quantise_nf4(weight: Tensor, group_size: int = 64) -> CodedMatrix:
    """``weight [out, in]`` in NormalFloat4, as bitsandbytes rounds; the last group of a row may be short."""
    rows, columns = weight.shape
    table = torch.tensor(NF4)
    borders = ((table[1:] + table[:-1]) / 2).tolist()
    groups = -(-columns // group_size)
    codes = torch.empty((rows, -(-columns // 64) * 32), dtype=torch.uint8, device=weight.device)
    scale = torch.empty((groups, rows), dtype=weight.dtype, device=weight.device)
    for first, end in _spans(rows, columns):
        wide = torch.nn.functional.pad(weight[first:end].float(), (0, groups * group_size - columns))
        grouped = wide.view(end - first, groups, group_size)
        largest = grouped.abs().amax(-1)
        grouped = grouped / _positive(largest)[:, :, None]
        nearest = torch.zeros(grouped.shape, dtype=torch.uint8, device=weight.device)
        for border in borders:
            nearest += (grouped > border).view(torch.uint8)
        codes[first:end] = pack(nearest.flatten(1)[:, :columns])
        scale[:, first:end] = largest.T.to(weight.dtype)
    return CodedMatrix(codes, 4, columns, scale, group_size, table=table.to(weight.device))


def dequantise(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """The matrix ``[out, in]`` that ``matrix`` stands for."""
    if isinstance(matrix, Tensor):
        return matrix.to(dtype)
    rows, columns = matrix.shape
    device = matrix.values.device if isinstance(matrix, ScaledMatrix) else matrix.codes.device
    out = torch.empty((rows, columns), dtype=dtype, device=device)
    for first, end in _spans(rows, columns):
        part = matrix.part(first, end)
        out[first:end] = _widen_scaled(part) if isinstance(part, ScaledMatrix) else _widen_coded(part)
    return out


def quantise_inputs(x: Tensor, matrix: ScaledMatrix) -> tuple[Tensor, Tensor]:
    """``x [tokens, in]`` as ``matrix``'s type, and the scales ``[tokens, 1 or blocks of columns]``, float32."""
    tokens, columns = x.shape
    blocks = -(-columns // matrix.columns_per_scale)
    wide = torch.nn.functional.pad(x.float(), (0, blocks * matrix.columns_per_scale - columns))
    values, scale = _round(wide.view(tokens * blocks, -1), matrix.values.dtype, matrix.input_scale)
    return values.view(tokens, -1)[:, :columns], scale.view(tokens, blocks)


def multiply(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    """``x [tokens, in]`` to ``[tokens, out]``, by inputs of 8 bits where ``matrix`` quantises them."""
    inputs = x.float()
    if isinstance(matrix, ScaledMatrix) and matrix.quantises_inputs:
        values, scale = quantise_inputs(x, matrix)
        inputs = values.float() * _spread(scale, 1, matrix.columns_per_scale, *x.shape)
    out = inputs @ dequantise(matrix, torch.float32).T
    return (out if bias is None else out + bias).to(x.dtype)


def linear(parts: Sequence[Matrix], bias: Tensor | None) -> Stacked:
    """The map of ``parts``, one below the other, by ``multiply``: what a compiled kernel computes, slowly."""

    def product(matrix: Matrix, bias: Tensor | None) -> Product:
        return lambda x: multiply(x, matrix, bias)

    return stack(parts, bias, product)


def _round(wide: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``wide [rows, columns]`` as numbers of 8 bits, and the rows' scales ``[rows, 1]``, infinite where a number is not
    finite; ties of int8 go up."""
    largest = wide.abs().amax(1, keepdim=True)
    if scale is None:
        scale = _positive(largest) / LARGEST[dtype]
    scaled = wide / scale
    scale = scale.expand(wide.shape[0], 1).where(largest.isfinite(), torch.inf)
    if dtype == torch.int8:
        return (scaled + 0.5).floor().clamp(-128, 127).to(dtype), scale
    return scaled.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype), scale


def _positive(largest: Tensor) -> Tensor:
    """What is divided by: zeros alone may be scaled by anything."""
    return torch.where(largest == 0, 1.0, largest)


def _widen_scaled(matrix: ScaledMatrix) -> Tensor:
    scale = _spread(matrix.scale, matrix.rows_per_scale, matrix.columns_per_scale, *matrix.shape)
    return matrix.values.float() * scale


def _widen_coded(matrix: CodedMatrix) -> Tensor:
    rows, columns = matrix.shape
    codes = unpack(matrix.codes, columns) if matrix.bits == 4 else matrix.codes
    if matrix.table is not None:
        numbers = matrix.table.index_select(0, codes.flatten().int()).view(rows, columns)
    elif matrix.zero is None:
        numbers = codes.float() - matrix.middle
    else:
        numbers = codes.float() - _spread(matrix.zero.T.float(), 1, matrix.group_size, rows, columns)
    wide = numbers * _spread(matrix.scale.T.float(), 1, matrix.group_size, rows, columns)
    if matrix.order is None:
        return wide
    ordered = torch.empty_like(wide)
    ordered[:, matrix.order] = wide
    return ordered


def _spread(scale: Tensor, per_row: int, per_column: int, rows: int, columns: int) -> Tensor:
    """One per number, of one per block of numbers; where one will do for a whole row, ``[rows, 1]``."""
    if per_row > 1:
        scale = scale.repeat_interleave(per_row, 0)[:rows]
    return scale if scale.shape[1] == 1 else scale.repeat_interleave(per_column, 1)[:, :columns]


def _spans(rows: int, columns: int) -> list[tuple[int, int]]:
    """The rows in parts of a bounded size, which begin where blocks of 128 rows do."""
    step = max(1, _AT_ONCE // max(1, columns) // 128) * 128
    return [(first, min(rows, first + step)) for first in range(0, rows, step)]
