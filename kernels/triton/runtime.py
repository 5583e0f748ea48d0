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

OLDEST = (8, 0)
OLDEST_FP8 = (8, 9)


@dataclass(frozen=True, slots=True)
class Target:
    """``num_sms``: processors that run programs side by side."""

    num_sms: int
    is_interpreted: bool


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def find_target(device: torch.device, *, fp8_kv: bool) -> Target:
    """Raises KernelsUnavailable, with what to do, where Triton's kernels cannot run."""
    if importlib.util.find_spec("triton") is None:
        raise KernelsUnavailable("Triton is not installed: pip install triton")
    if is_interpreted():
        return Target(num_sms=4, is_interpreted=True)
    if device.type != "cuda":
        raise KernelsUnavailable(f"Triton's kernels run on CUDA devices, not on {device.type}")
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        raise KernelsUnavailable(f"Triton's kernels need compute capability 8.0, {_name(device)}")
    if fp8_kv and capability < OLDEST_FP8:
        raise KernelsUnavailable(f"fp8 keys and values need compute capability 8.9, {_name(device)}")
    return Target(torch.cuda.get_device_properties(device).multi_processor_count, is_interpreted=False)


def _name(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"and {torch.cuda.get_device_name(device)} has {major}.{minor}"
