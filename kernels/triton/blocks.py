"""Moving and summing blocks by Triton: the twins of ``kernels.reference.blocks`` for CUDA devices.

Each is one launch for any number of blocks. A total is a sum mod 2^64, so the order of its terms changes nothing, and
its bits are those of the CPU. Rows are read in 64-bit words: a block has a whole number of them, and memory begins at
one (see ``takes``).
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.reference.blocks import WORD_BYTES
from kernels.triton import block_kernels

COPY_TILE = 2048
"""Words that one program copies: 16 KiB."""
SUM_TILE = 2048
SUM_ROWS = 8
"""Blocks whose tiles one program sums."""


def copy_blocks(source: Tensor, source_rows: Tensor, target: Tensor, target_rows: Tensor) -> None:
    """As the reference's. ``source`` may be memory of another process or device that this device can read."""
    if not len(source_rows):
        return
    from_words, to_words = source.view(torch.int64), target.view(torch.int64)
    num_words = from_words.shape[1]
    block_kernels.copy[(len(source_rows), triton.cdiv(num_words, COPY_TILE))](
        from_words,
        source_rows,
        to_words,
        target_rows,
        from_words.stride(0),
        to_words.stride(0),
        num_words,
        TILE=COPY_TILE,
    )


def sum_blocks(blocks: Tensor, rows: Tensor, key: Tensor) -> Tensor:
    """As the reference's."""
    words = blocks.view(torch.int64)
    num_words = words.shape[1]
    num_tiles = triton.cdiv(num_words, SUM_TILE)
    partials = torch.empty((len(rows), num_tiles), dtype=torch.int64, device=blocks.device)
    if len(rows):
        block_kernels.sum_tiles[(triton.cdiv(len(rows), SUM_ROWS), num_tiles)](
            words,
            rows,
            key,
            partials,
            len(rows),
            num_words,
            num_tiles,
            words.stride(0),
            TILE=SUM_TILE,
            ROWS=SUM_ROWS,
        )
    return partials.sum(1)


def takes(block_bytes: int) -> bool:
    """Whether blocks of that size can be read in words."""
    return block_bytes % WORD_BYTES == 0
