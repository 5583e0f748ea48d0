"""Whether Triton's kernels can run here, and on what. Imports without Triton.

TRITON_INTERPRET=1 (set before a kernel's module is imported) runs kernels in numpy, on CPU tensors: for tests and
debugging.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch

from kernels.types import KernelsUnavailable

MAX_HEAD_DIM = 256
OLDEST = (8, 0)
OLDEST_FP8 = (8, 9)
SMALL = ((8, 6), (8, 9), (12, 0), (12, 1))
"""Those with 99 KB of shared memory for a program; the others have 163 KB or more."""


@dataclass(frozen=True, slots=True)
class Target:
    """``num_sms``: processors that run programs side by side. ``has_fp8``: they convert and multiply float8_e4m3fn.
    ``is_roomy``: tiles for heads of 256 fit into their shared memory."""

    num_sms: int
    is_interpreted: bool
    has_fp8: bool = True
    is_roomy: bool = True


def find_target(device: torch.device) -> Target:
    """Raises KernelsUnavailable where Triton's kernels cannot run."""
    if importlib.util.find_spec("triton") is None:
        raise KernelsUnavailable("it is not installed (pip install triton)")
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        return Target(num_sms=4, is_interpreted=True)
    if device.type != "cuda":
        raise KernelsUnavailable(f"its kernels run on CUDA devices, not on {device.type}, but for TRITON_INTERPRET=1")
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    if capability < OLDEST:
        raise KernelsUnavailable(f"its kernels need compute capability 8.0, {properties.name} has {capability}")
    return Target(
        properties.multi_processor_count,
        is_interpreted=False,
        has_fp8=capability >= OLDEST_FP8,
        is_roomy=capability not in SMALL,
    )
