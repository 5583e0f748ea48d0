"""Linear maps whose rows have the same bits in any batch, behind the signature of ``kernels.reference.linear``.

Norms, rotations, gates and draws of ``kernels.triton`` look at one row at a time anyway; attention has its own way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from kernels.triton import batch_invariant_kernels
from kernels.triton.runtime import Target
from kernels.types import Linear

_GROUP_ROWS = 8
"""Row tiles that walk along the matrix together, so that they find its tiles in the cache."""


@dataclass(frozen=True, slots=True)
class Tile:
    """``rows`` of x by ``columns`` of the result, ``depth`` numbers of each at once, by ``warps``."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class InvariantLinears:
    target: Target

    def linear(self, parts: Sequence[Tensor], bias: Tensor | None) -> Linear:
        return InvariantLinear(torch.cat(list(parts)), bias, self.target)


@dataclass(frozen=True, slots=True)
class InvariantLinear:
    """Everything is added in float32."""

    weight: Tensor
    bias: Tensor | None
    target: Target

    def __call__(self, x: Tensor) -> Tensor:
        columns, depth = self.weight.shape
        assert x.stride(1) == 1
        tile = _tile(columns, x.dtype)
        out = torch.empty((x.shape[0], columns), dtype=x.dtype, device=x.device)
        num_tiles = triton.cdiv(x.shape[0], tile.rows) * triton.cdiv(columns, tile.columns)
        if num_tiles:
            batch_invariant_kernels.multiply[(num_tiles,)](
                x,
                self.weight,
                self.bias,
                out,
                x.shape[0],
                columns,
                depth,
                x.stride(0),
                self.weight.stride(0),
                out.stride(0),
                HAS_BIAS=self.bias is not None,
                IS_INTERPRETED=self.target.is_interpreted,
                BLOCK_M=tile.rows,
                BLOCK_N=tile.columns,
                BLOCK_K=tile.depth,
                GROUP=_GROUP_ROWS,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
        return out

    def rows(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)


def _tile(columns: int, dtype: torch.dtype) -> Tile:
    """Follows from the matrix alone. A narrow matrix gets narrow tiles: more of them, for few rows too."""
    if dtype == torch.float32:
        return Tile(32, 32, depth=32, warps=4, stages=2)
    return Tile(64, 64 if columns <= 8192 else 128, depth=64, warps=4, stages=4)
