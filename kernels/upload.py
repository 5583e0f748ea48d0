"""Small lists of numbers on their way to a device, without a wait for what it is doing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Numbers = Sequence[int] | Sequence[float] | Sequence[Sequence[int]] | np.ndarray


def upload(numbers: Numbers, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of ``numbers`` on ``device``: to a GPU from page-locked memory, behind the work that is queued there."""
    here = torch.as_tensor(numbers, dtype=dtype)
    if device.type == "cpu":
        return here
    return here.pin_memory().to(device, non_blocking=True)
