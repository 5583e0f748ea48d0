"""Where numbers that share a piece of memory begin.

Kernels load 16 bytes at once where a tensor begins at a multiple of them, and Triton makes another program for one that
does not.
"""

from __future__ import annotations

import torch

_BYTES = 16


def aligned(count: int, dtype: torch.dtype) -> int:
    """``count`` numbers, and as many more as take what comes behind them to a multiple of 16 bytes."""
    return count + -count % (_BYTES // dtype.itemsize)
