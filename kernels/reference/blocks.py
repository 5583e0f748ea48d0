"""Moving whole blocks of KV memory, and summing them for their checksum, in plain torch, on any device.

Memory is ``[rows, block_bytes]`` of uint8; a row is a block. Knows bytes; what a block means, and what is made of a
sum, is the transfer layer's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK = 0xFFFF_FFFF
WORD_BYTES = 8
"""A sum takes so many bytes at a time, zeros behind the last ones."""


def copy_blocks(source: Tensor, source_rows: Tensor, target: Tensor, target_rows: Tensor) -> None:
    """Row ``target_rows[i]`` of ``target`` becomes row ``source_rows[i]`` of ``source``, for each i. Rows are int64."""
    target[target_rows] = source[source_rows]


def sum_blocks(blocks: Tensor, rows: Tensor, key: Tensor) -> Tensor:
    """The ``total`` of each of ``rows`` as in ``kvtransfer.integrity``, int64 ``[len(rows)]``: its 64 bits, signed.

    ``key``: the key's 64-bit words as int64, ``ceil(block_bytes / 8)`` of them.
    """
    chosen = F.pad(blocks[rows], (0, -blocks.shape[1] % WORD_BYTES))
    words = chosen.view(torch.int32).to(torch.int64)
    keyed = (words + key.view(torch.int32)) & _MASK
    # Both factors are below 2^32: the product and the sum wrap to the right 64 bits, whatever sign they show.
    return (keyed[:, 0::2] * keyed[:, 1::2]).sum(1)
