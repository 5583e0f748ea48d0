"""Which implementation of the maths runs: one choice, made at start, and then passed along as a value."""

from __future__ import annotations

from dataclasses import replace

import torch

from kernels import noise, reference
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
    gumbel=noise.gumbel,
)


def choose(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest kernels for models of ``dtype`` on ``device``: compiled ones on CPUs with AMX.

    For other types than bfloat16 those compute the noise of draws alone.
    """
    compiled = native.load() if device.type == "cpu" else None
    if compiled is None:
        return REFERENCE
    if dtype != torch.bfloat16:
        return replace(REFERENCE, name="torch, amx noise", gumbel=compiled.gumbel)
    return Kernels(
        name="amx",
        linear=compiled.linear,
        rms_norm=compiled.rms_norm,
        rotate=compiled.rotate,
        gate=compiled.gate,
        write_kv=reference.write_kv,
        attend=compiled.attend,
        gumbel=compiled.gumbel,
    )
