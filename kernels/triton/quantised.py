"""Linear maps of quantised weights by Triton, as ``kernels.reference.quantised``: which tiles, how many splits.

A ``ScaledMatrix`` that bears inputs of 8 bits gets them where the device multiplies them (fp8: compute capability 8.9);
all other weights are widened in registers to the type of the activations. A matrix whose groups no tile fits is
dequantised when it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quantised import FP8, CodedMatrix, Matrix, Product, ScaledMatrix, Stacked, stack
from kernels.reference.quantised import dequantise
from kernels.triton import quantised_kernels
from kernels.triton.runtime import Target

MAX_SPLITS = 16
_WAVES = 2
"""Programs per processor that splitting aims at."""
_INPUT_BLOCK = 1024
_MERGE_BLOCK = 1024

Plain = Callable[[Sequence[Tensor], Tensor | None], Product]
"""As ``kernels.types.Kernels.linear``."""

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True, slots=True)
class Tiles:
    """``rows`` of the matrix times ``tokens``, ``depth`` bytes of a row at once; ``stages`` tiles are in flight."""

    rows: int
    tokens: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class TritonQuantised:
    """``linear`` is as ``kernels.reference.quantised.linear``, for activations of ``dtype``; ``plain`` multiplies what
    is not quantised. Makes no host wait for the device. Batch-invariant products have one shape of tiles and no splits.
    """

    target: Target
    dtype: torch.dtype
    plain: Plain
    is_batch_invariant: bool = False

    def linear(self, parts: Sequence[Matrix], bias: Tensor | None) -> Stacked:
        return stack(parts, bias, self._product)

    def _product(self, matrix: Matrix, bias: Tensor | None) -> Product:
        if isinstance(matrix, ScaledMatrix):
            return _Scaled(matrix, bias, self)
        if isinstance(matrix, CodedMatrix) and coded_depth(matrix):
            table = None if matrix.table is None else matrix.table.to(self.compute)
            return _Coded(matrix, table, bias, self)
        return self.plain([dequantise(matrix, self.dtype)], bias)

    @property
    def compute(self) -> torch.dtype:
        """The interpreter cannot multiply bfloat16."""
        is_emulated = self.target.is_interpreted and self.dtype == torch.bfloat16
        return torch.float32 if is_emulated else self.dtype

    def tiles(self, tokens: int, depth: int, most_depth: int) -> Tiles:
        """For ``tokens`` tokens; ``depth``: a tile of few tokens, which reads memory, takes so many bytes of a row, and
        one of many tokens at most ``most_depth``."""
        if self.compute == torch.float32:
            return Tiles(64, 32, min(depth, 32), warps=4, stages=2)
        if self.is_batch_invariant:
            return Tiles(64, 64, min(depth, most_depth), warps=4, stages=3)
        if tokens <= 64:
            return Tiles(64, max(16, triton.next_power_of_2(tokens)), depth, warps=4, stages=4)
        return Tiles(128, 128, min(depth, most_depth), warps=8, stages=3)

    def splits(self, num_programs: int, num_tiles: int) -> int:
        """Parts to cut the columns into, from shapes alone. Each has four tiles at least, so that reading is ahead."""
        if self.is_batch_invariant:
            return 1
        wanted = _WAVES * self.target.num_sms // max(1, num_programs)
        return max(1, min(MAX_SPLITS, num_tiles // 4, wanted))


def coded_depth(matrix: CodedMatrix) -> int:
    """The bytes of a row that a tile takes, so that each lot has one group; 0 where none fits."""
    if matrix.group_size >= matrix.columns:
        return 64
    if matrix.bits == 8:
        return min(64, matrix.group_size & -matrix.group_size) if matrix.group_size % 16 == 0 else 0
    return 64 if matrix.group_size % 128 == 0 else 32 if matrix.group_size % 32 == 0 else 0


class _Scaled:
    """One ``ScaledMatrix`` with an optional bias."""

    def __init__(self, matrix: ScaledMatrix, bias: Tensor | None, how: TritonQuantised) -> None:
        self._matrix = matrix
        self._bias = bias
        self._how = how
        is_int = matrix.values.dtype == torch.int8
        self._quantises = matrix.quantises_inputs and (is_int or how.target.has_fp8)
        if self._quantises:
            self._kind, self._values = "8-bit", matrix.values
            self._compute = tl.int8 if is_int else tl.float32 if how.target.is_interpreted else tl.float8e4nv
        else:
            self._kind = "int8" if is_int else "fp8" if how.target.has_fp8 else "bytes"
            self._values = matrix.values.view(torch.uint8) if self._kind == "bytes" else matrix.values
            self._compute = _TYPES[how.compute]

    def __call__(self, x: Tensor) -> Tensor:
        matrix = self._matrix
        tokens, (rows, columns) = x.shape[0], matrix.shape
        if not tokens:
            return x.new_empty((0, rows))
        x = x if x.stride(1) == 1 else x.contiguous()
        inputs, x_scales = self._quantise(x) if self._quantises else (x, matrix.scale)
        tiles = self._how.tiles(tokens, 128, 128 if self._quantises else 64)
        launch = _Launch.plan(self._how, x, rows, tiles, triton.cdiv(columns, tiles.depth))
        quantised_kernels.multiply_scaled[launch.grid](
            inputs,
            x_scales,
            self._values,
            matrix.scale,
            x if self._bias is None else self._bias,
            launch.target,
            tokens,
            rows,
            columns,
            launch.tiles_per_split,
            inputs.stride(0),
            x_scales.stride(0),
            self._values.stride(0),
            matrix.scale.stride(0),
            rows,
            tokens * rows,
            ROWS_PER_SCALE=matrix.rows_per_scale,
            COLUMNS_PER_SCALE=matrix.columns_per_scale,
            KIND=self._kind,
            HAS_BLOCKS=matrix.has_blocks,
            COMPUTE=self._compute,
            IS_SPLIT=launch.splits > 1,
            HAS_BIAS=self._bias is not None,
            BLOCK_N=tiles.rows,
            BLOCK_M=tiles.tokens,
            BLOCK_K=tiles.depth,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        return launch.result(self._bias)

    def _quantise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        matrix = self._matrix
        tokens, columns = x.shape
        blocks = triton.cdiv(columns, matrix.columns_per_scale)
        values = torch.empty((tokens, columns), dtype=matrix.values.dtype, device=x.device)
        scales = torch.empty((tokens, blocks), dtype=torch.float32, device=x.device)
        fixed = matrix.input_scale
        quantised_kernels.quantise_inputs[(tokens, blocks)](
            x,
            scales if fixed is None else fixed,
            values,
            scales,
            columns,
            matrix.columns_per_scale,
            x.stride(0),
            values.stride(0),
            scales.stride(0),
            IS_INT=values.dtype != FP8,
            HAS_FIXED=fixed is not None,
            BLOCK=min(_INPUT_BLOCK, triton.next_power_of_2(matrix.columns_per_scale)),
        )
        return values, scales


class _Coded:
    """One ``CodedMatrix`` with an optional bias."""

    def __init__(self, matrix: CodedMatrix, table: Tensor | None, bias: Tensor | None, how: TritonQuantised) -> None:
        self._matrix = matrix
        self._table = table
        self._bias = bias
        self._how = how
        self._depth = coded_depth(matrix)

    def __call__(self, x: Tensor) -> Tensor:
        matrix = self._matrix
        tokens, (rows, columns), num_bytes = x.shape[0], matrix.shape, matrix.codes.shape[1]
        if not tokens:
            return x.new_empty((0, rows))
        if matrix.order is not None:
            x = x.index_select(1, matrix.order)
        x = x if x.stride(1) == 1 else x.contiguous()
        tiles = self._how.tiles(tokens, self._depth, 64 if matrix.bits == 8 else 32)
        launch = _Launch.plan(self._how, x, rows, tiles, triton.cdiv(num_bytes, tiles.depth))
        quantised_kernels.multiply_coded[launch.grid](
            x,
            matrix.codes,
            matrix.scale,
            matrix.codes if matrix.zero is None else matrix.zero,
            x if self._table is None else self._table,
            x if self._bias is None else self._bias,
            launch.target,
            tokens,
            rows,
            columns,
            num_bytes,
            launch.tiles_per_split,
            matrix.group_size,
            x.stride(0),
            num_bytes,
            rows,
            rows,
            tokens * rows,
            BITS=matrix.bits,
            MIDDLE=matrix.middle,
            HAS_ZERO=matrix.zero is not None,
            HAS_TABLE=self._table is not None,
            HAS_GROUPS=matrix.scale.shape[0] > 1,
            COMPUTE=_TYPES[self._how.compute],
            IS_SPLIT=launch.splits > 1,
            HAS_BIAS=self._bias is not None,
            BLOCK_N=tiles.rows,
            BLOCK_M=tiles.tokens,
            BLOCK_B=tiles.depth,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        return launch.result(self._bias)


@dataclass(frozen=True, slots=True)
class _Launch:
    """``target``: the result ``[tokens, rows]`` of ``dtype``, or float32 ``[splits, tokens, rows]`` to be added up."""

    grid: tuple[int, int]
    splits: int
    tiles_per_split: int
    target: Tensor
    dtype: torch.dtype

    @classmethod
    def plan(cls, how: TritonQuantised, x: Tensor, rows: int, tiles: Tiles, num_tiles: int) -> _Launch:
        """``num_tiles``: along a row."""
        tokens = x.shape[0]
        programs = triton.cdiv(rows, tiles.rows) * triton.cdiv(tokens, tiles.tokens)
        splits = how.splits(programs, num_tiles)
        per_split = triton.cdiv(num_tiles, splits)
        splits = triton.cdiv(num_tiles, per_split)
        shape, dtype = ((tokens, rows), x.dtype) if splits == 1 else ((splits, tokens, rows), torch.float32)
        return cls((programs, splits), splits, per_split, torch.empty(shape, dtype=dtype, device=x.device), x.dtype)

    def result(self, bias: Tensor | None) -> Tensor:
        if self.splits == 1:
            return self.target
        splits, tokens, rows = self.target.shape
        out = torch.empty((tokens, rows), dtype=self.dtype, device=self.target.device)
        quantised_kernels.merge[(tokens, triton.cdiv(rows, _MERGE_BLOCK))](
            self.target,
            out if bias is None else bias,
            out,
            rows,
            splits,
            tokens * rows,
            rows,
            HAS_BIAS=bias is not None,
            BLOCK=_MERGE_BLOCK,
        )
        return out
