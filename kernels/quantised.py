"""Matrices in fewer bits, as kernels take them, whatever format a checkpoint stores them in.

A ``Matrix`` maps ``x [tokens, in]`` to ``x @ matrix [out, in].T``. Knows how numbers are packed; knows nothing of
files or of products (``kernels.reference.quantised``, ``kernels.triton.quantised``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn

_HALF = 32
"""Numbers of 4 bits go in chunks of 64: byte j of a chunk has its number j below and its number j + 32 above, so that
a kernel reads both halves of a chunk of activations without gaps."""


@dataclass(frozen=True, slots=True)
class ScaledMatrix:
    """Numbers of 8 bits, times a scale that neighbours share.

    ``values [out, in]``: float8_e4m3fn or int8. ``scale``, float32: one per ``rows_per_scale`` rows and
    ``columns_per_scale`` columns, the last ones possibly for fewer.

    With ``quantises_inputs`` the weights bear activations of their own type, where a kernel multiplies in 8 bits:
    scaled by ``input_scale`` (float32, one number), or else by the largest of a token's ``columns_per_scale`` columns.
    """

    values: Tensor
    scale: Tensor
    rows_per_scale: int
    columns_per_scale: int
    quantises_inputs: bool
    input_scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def has_blocks(self) -> bool:
        """Whether a row has more than one scale."""
        return self.columns_per_scale < self.values.shape[1]

    def part(self, first: int, end: int) -> ScaledMatrix:
        """Rows first to end - 1; first is a multiple of ``rows_per_scale``."""
        per = self.rows_per_scale
        return replace(self, values=self.values[first:end], scale=self.scale[first // per : -(-end // per)])


@dataclass(frozen=True, slots=True)
class CodedMatrix:
    """Codes of 4 or 8 bits: a number is (code - zero) * scale, or table[code] * scale.

    ``codes``, uint8: ``[out, in]``, or two in a byte as ``pack`` does it, ``columns`` (in) being known apart.
    ``scale [groups, out]``, any floating type: one per ``group_size`` columns of a row. ``zero [groups, out]``, uint8;
    None is the middle code (8 or 128). ``table``, float32 with 16 entries, replaces code - zero.
    ``order [in]``, int64: column j is for input order[j]; None: for input j.
    """

    codes: Tensor
    bits: int
    columns: int
    scale: Tensor
    group_size: int
    zero: Tensor | None = None
    table: Tensor | None = None
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.columns

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    def part(self, first: int, end: int) -> CodedMatrix:
        """Rows first to end - 1."""
        zero = None if self.zero is None else self.zero[:, first:end]
        return replace(self, codes=self.codes[first:end], scale=self.scale[:, first:end], zero=zero)


Matrix = Tensor | ScaledMatrix | CodedMatrix
Product = Callable[[Tensor], Tensor]


def pack(codes: Tensor) -> Tensor:
    """4-bit ``codes [out, in]`` (uint8) two in a byte: ``[out, 32 * ceil(in / 64)]``."""
    rows, columns = codes.shape
    chunks = F.pad(codes, (0, -columns % (2 * _HALF))).view(rows, -1, 2, _HALF)
    return (chunks[:, :, 0] | chunks[:, :, 1] << 4).flatten(1)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """What ``pack`` was given."""
    chunks = packed.view(packed.shape[0], -1, 1, _HALF)
    return torch.cat((chunks & 15, chunks >> 4), 2).flatten(1)[:, :columns]


@dataclass(frozen=True, slots=True)
class Stacked:
    """Products of one input, their results side by side."""

    products: tuple[Product, ...]

    def __call__(self, x: Tensor) -> Tensor:
        results = [product(x) for product in self.products]
        return results[0] if len(results) == 1 else torch.cat(results, -1)


def stack(parts: Sequence[Matrix], bias: Tensor | None, product: Callable[[Matrix, Tensor | None], Product]) -> Stacked:
    """The linear map of ``parts``, one below the other: those that are alike as one ``product``."""
    products: list[Product] = []
    first = 0
    for matrix in fuse(parts):
        end = first + matrix.shape[0]
        products.append(product(matrix, None if bias is None else bias[first:end]))
        first = end
    return Stacked(tuple(products))


def fuse(parts: Sequence[Matrix]) -> list[Matrix]:
    """The same rows in as few matrices as their kinds allow."""
    fused: list[list[Matrix]] = []
    for part in parts:
        if fused and _alike(fused[-1][-1], part):
            fused[-1].append(part)
        else:
            fused.append([part])
    return [_join(alike) for alike in fused]


def _alike(above: Matrix, below: Matrix) -> bool:
    match above, below:
        case Tensor(), Tensor():
            return True
        case ScaledMatrix(), ScaledMatrix():
            fits = above.shape[0] % above.rows_per_scale == 0
            return fits and _kind_of_scaled(above) == _kind_of_scaled(below)
        case CodedMatrix(), CodedMatrix():
            alike = _kind_of_coded(above) == _kind_of_coded(below)
            return alike and _same(above.table, below.table) and _same(above.order, below.order)
    return False


def _kind_of_scaled(matrix: ScaledMatrix) -> tuple[object, ...]:
    has_scale = matrix.input_scale is not None
    sharing = (matrix.rows_per_scale, matrix.columns_per_scale)
    return (matrix.values.dtype, *sharing, matrix.quantises_inputs, has_scale)


def _kind_of_coded(matrix: CodedMatrix) -> tuple[object, ...]:
    return (matrix.bits, matrix.columns, matrix.group_size, matrix.scale.dtype, matrix.zero is None)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _join(alike: Sequence[Matrix]) -> Matrix:
    """One matrix of matrices that ``_alike`` finds alike. A fixed input scale must do for all: it is their largest."""
    first = alike[0]
    if len(alike) == 1:
        return first
    if isinstance(first, ScaledMatrix):
        scaled = [matrix for matrix in alike if isinstance(matrix, ScaledMatrix)]
        fixed = [matrix.input_scale for matrix in scaled if matrix.input_scale is not None]
        return replace(
            first,
            # Few operations know fp8: bytes are joined.
            values=torch.cat([m.values.view(torch.uint8) for m in scaled]).view(first.values.dtype),
            scale=torch.cat([m.scale for m in scaled]),
            input_scale=torch.stack(fixed).amax(0) if fixed else None,
        )
    if isinstance(first, CodedMatrix):
        coded = [matrix for matrix in alike if isinstance(matrix, CodedMatrix)]
        zeros = [matrix.zero for matrix in coded if matrix.zero is not None]
        return replace(
            first,
            codes=torch.cat([m.codes for m in coded]),
            scale=torch.cat([m.scale for m in coded], 1),
            zero=torch.cat(zeros, 1) if zeros else None,
        )
    return torch.cat([matrix for matrix in alike if isinstance(matrix, Tensor)])
