"""Which implementation of the maths runs: one choice, made at start, and then passed along as a value."""

from __future__ import annotations

import torch

from kernels import reference
from kernels.cpu import native
from kernels.types import Kernels

REFERENCE = Kernels(
    name="torch",
    linear=reference.linear,
    rms_norm=reference.rms_norm,
    rotate=reference.rotate,
    gate=reference.gate,
    write_kv=reference.write_kv,
    attend=reference.attend,
)


def choose(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest kernels for models of ``dtype`` on ``device``: compiled ones for bfloat16 on CPUs with AMX."""
    compiled = native.load() if device.type == "cpu" and dtype == torch.bfloat16 else None
    if compiled is None:
        return REFERENCE
    return Kernels(
        name="amx",
        linear=compiled.linear,
        rms_norm=compiled.rms_norm,
        rotate=compiled.rotate,
        gate=compiled.gate,
        write_kv=reference.write_kv,
        attend=compiled.attend,
    )
