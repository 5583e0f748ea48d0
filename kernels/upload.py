"""Small lists of numbers on their way to a device, without a wait for what it is doing.

To a GPU they go from page-locked memory, behind the work that is queued there. torch keeps that memory until the copy
is done.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.alignment import aligned

Numbers = Sequence[int] | Sequence[float] | Sequence[Sequence[int]] | Sequence[Sequence[float]] | np.ndarray


def upload(numbers: Numbers, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of ``numbers`` on ``device``."""
    here = torch.as_tensor(numbers, dtype=dtype)
    return here if device.type == "cpu" else here.pin_memory().to(device, non_blocking=True)


def upload_into(target: Tensor, numbers: np.ndarray) -> None:
    """``target`` becomes equal to ``numbers``, of the same shape and type."""
    here = torch.from_numpy(np.ascontiguousarray(numbers))
    target.copy_(here if target.device.type == "cpu" else here.pin_memory(), non_blocking=True)


def upload_together(parts: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """int64 tensors of ``parts``; to a GPU in one copy."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(part, dtype=np.int64)) for part in parts]
    sizes = [aligned(part.size, torch.int64) for part in parts]
    packed = np.zeros(sum(sizes), dtype=np.int64)
    starts = [sum(sizes[:index]) for index in range(len(parts))]
    for part, start in zip(parts, starts, strict=True):
        packed[start : start + part.size] = part.reshape(-1)
    there = upload(packed, torch.int64, device)
    return [there[start : start + part.size].view(part.shape) for part, start in zip(parts, starts, strict=True)]
