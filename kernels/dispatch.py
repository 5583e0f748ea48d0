"""Which implementation of the maths runs: one choice, made at start, and then passed along as a value."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import torch

from kernels import reference
from kernels.cpu import native, ordered
from kernels.triton import runtime
from kernels.types import Kernels, KernelsUnavailable

log = logging.getLogger(__name__)

REFERENCE = Kernels(
    name="torch",
    linear=reference.linear,
    add_norm=reference.add_norm,
    rotate_and_write=reference.rotate_and_write,
    gate=reference.gate,
    attend=reference.attend,
    draw=reference.draw,
)


def choose(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest kernels for models of ``dtype`` on ``device``: compiled ones on CPUs with AMX.

    For other types than bfloat16 those compute the noise of draws alone. On a GPU, Triton multiplies quantised weights.
    """
    if device.type != "cpu":
        return _with_quantised(REFERENCE, device, dtype)
    compiled = native.load(REFERENCE)
    if compiled is None:
        return REFERENCE
    if dtype != torch.bfloat16:
        return replace(REFERENCE, name="torch, amx noise", draw=partial(reference.draw, gumbel=compiled.gumbel))
    return _on_tiles(compiled, REFERENCE)


def choose_batch_invariant(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernels:
    """Kernels with ``is_batch_invariant``: on AMX tiles for bfloat16 where there are any, else on any CPU.

    Raises KernelsUnavailable where there are none for such a model.
    """
    if device.type != "cpu":
        raise KernelsUnavailable(f"there are none for {device.type} devices, only for the CPU")
    if dtype not in ordered.DTYPES:
        raise KernelsUnavailable(f"there are none for {dtype}, only for float32 and bfloat16")
    if head_dim > ordered.MAX_HEAD_DIM:
        raise KernelsUnavailable(f"heads have {head_dim} dimensions, and {ordered.MAX_HEAD_DIM} is the most they take")
    anywhere = ordered.make()
    compiled = native.load(anywhere)
    if compiled is None:
        return anywhere
    if dtype != torch.bfloat16:
        return replace(anywhere, name="ordered, amx noise", draw=partial(reference.draw, gumbel=compiled.gumbel))
    return _on_tiles(compiled, anywhere)


def _with_quantised(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> Kernels:
    """``kernels``, with products of quantised weights where Triton runs; elsewhere those are plain ones."""
    try:
        target = runtime.find_target(device, fp8_kv=False)
    except KernelsUnavailable as reason:
        log.info("Quantised weights would be multiplied plain: %s", reason)
        return kernels
    from kernels.triton import quantised

    products = quantised.make(target, device, dtype, is_batch_invariant=kernels.is_batch_invariant)
    return replace(kernels, quantised=products.linear)


def _on_tiles(compiled: native.NativeKernels, other: Kernels) -> Kernels:
    return replace(
        other,
        name="amx" if other is REFERENCE else f"amx, {other.name}",
        linear=compiled.linear,
        add_norm=compiled.add_norm,
        rotate_and_write=compiled.rotate_and_write,
        gate=compiled.gate,
        attend=compiled.attend,
        draw=partial(reference.draw, gumbel=compiled.gumbel),
    )
