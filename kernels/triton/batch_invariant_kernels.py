"""The product of a matrix whose rows have the same bits in any batch, as a Triton program.

A row's sums have one order, because a tile's size, and the order in which it adds its columns, follow from the matrix
alone: never from how many rows there are.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def multiply(
    x,
    weight,
    bias,
    out,
    num_rows,
    num_columns,
    depth,
    x_stride,
    weight_stride,
    out_stride,
    HAS_BIAS: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``out [num_rows, num_columns]`` = ``x [num_rows, depth]`` @ ``weight [num_columns, depth]``.T. Grid: tiles."""
    # The interpreter cannot multiply bfloat16.
    compute = tl.float32 if IS_INTERPRETED else x.dtype.element_ty
    column_tiles = tl.cdiv(num_columns, BLOCK_N)
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    tile = tl.program_id(0)
    first = tile // (GROUP * column_tiles) * GROUP
    in_group = tl.minimum(row_tiles - first, GROUP)
    within = tile % (GROUP * column_tiles)
    rows = ((first + within % in_group) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = (within // in_group * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    is_row = rows < num_rows
    is_column = columns < num_columns
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        is_inner = inner < depth
        left = tl.load(
            x + rows[:, None] * x_stride + inner[None, :], mask=is_row[:, None] & is_inner[None, :], other=0.0
        )
        right = tl.load(
            weight + columns[:, None] * weight_stride + inner[None, :],
            mask=is_column[:, None] & is_inner[None, :],
            other=0.0,
        )
        total = tl.dot(left.to(compute), tl.trans(right.to(compute)), total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    place = out + rows[:, None] * out_stride + columns[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
