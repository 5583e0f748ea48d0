"""Copying and summing blocks, as Triton programs: see ``kernels.triton.blocks``, which launches them.

A program copies a tile of one block, or sums the same tile of several: the key's words are loaded once for all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy(source, source_rows, target, target_rows, source_stride, target_stride, num_words, TILE: tl.constexpr):
    at = tl.program_id(0)
    words = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = words < num_words
    source_row = tl.load(source_rows + at)
    target_row = tl.load(target_rows + at)
    data = tl.load(source + source_row * source_stride + words, mask=inside)
    tl.store(target + target_row * target_stride + words, data, mask=inside)


@triton.jit
def sum_tiles(
    blocks, rows, key, partials, num_rows, num_words, num_tiles, stride, TILE: tl.constexpr, ROWS: tl.constexpr
):
    """``partials [num_rows, num_tiles]``: each tile's share of its row's total."""
    tile = tl.program_id(1)
    words = tile * TILE + tl.arange(0, TILE)
    inside = words < num_words
    key_words = tl.load(key + words, mask=inside, other=0)
    low_key = key_words.to(tl.uint32)
    high_key = (key_words >> 32).to(tl.uint32)
    for step in range(ROWS):
        at = tl.program_id(0) * ROWS + step
        if at < num_rows:
            row = tl.load(rows + at)
            data = tl.load(blocks + row * stride + words, mask=inside, other=0)
            low = data.to(tl.uint32) + low_key
            high = (data >> 32).to(tl.uint32) + high_key
            # Behind the end both factors are 0, and so is their product.
            products = low.to(tl.uint64) * high.to(tl.uint64)
            tl.store(partials + at * num_tiles + tile, tl.sum(products).to(tl.int64))
