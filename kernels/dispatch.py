"""Which implementation of the maths runs: one choice, made at start, and then passed along as a value."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version

import torch

from kernels import reference
from kernels.cpu import native, ordered
from kernels.triton import runtime
from kernels.triton.runtime import Target
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


@dataclass(frozen=True, slots=True)
class Task:
    """What kernels are for: a model of ``dtype`` and ``head_dim`` on ``device``.

    ``attention``: auto, triton or torch. With ``has_fp8_kv`` keys and values are stored as float8_e4m3fn.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    attention: str = "auto"
    has_fp8_kv: bool = False


def choose(task: Task) -> Kernels:
    """The fastest kernels: Triton's on CUDA devices; on CPUs with AMX compiled ones for bfloat16, which for other types
    compute the noise of draws alone.

    Raises KernelsUnavailable, with what to do, where the task asks for what there is not.
    """
    if task.device.type == "cuda":
        return _on_cuda(task)
    kernels = _on_cpu(task.dtype, REFERENCE)
    if task.attention == "torch":
        return replace(kernels, name=f"{kernels.name}, torch attention", attend=reference.attend)
    return _with_triton_attention(task, kernels) if task.attention == "triton" else kernels


def choose_batch_invariant(task: Task) -> Kernels:
    """Kernels with ``is_batch_invariant``: Triton's on CUDA devices; on CPUs compiled ones, on AMX tiles for bfloat16
    where there are any.

    Raises KernelsUnavailable where there are none for such a task.
    """
    if task.attention == "torch":
        raise KernelsUnavailable("torch's attention depends on the batch; leave attention_backend at auto")
    if task.device.type == "cuda":
        return _triton(task, _find_target(task), is_batch_invariant=True)
    if task.dtype not in ordered.DTYPES:
        raise KernelsUnavailable(f"on a CPU there are none for {task.dtype}, only for float32 and bfloat16")
    if task.head_dim > ordered.MAX_HEAD_DIM:
        raise KernelsUnavailable(f"heads have {task.head_dim} dimensions, {ordered.MAX_HEAD_DIM} is the most they take")
    kernels = _on_cpu(task.dtype, ordered.make())
    return _with_triton_attention(task, kernels) if task.attention == "triton" else kernels


def _on_cpu(dtype: torch.dtype, other: Kernels) -> Kernels:
    """``other``, but for what this processor has compiled kernels for."""
    compiled = native.load(other)
    if compiled is None:
        return other
    draw = partial(reference.draw, gumbel=compiled.gumbel)
    if dtype != torch.bfloat16:
        return replace(other, name=f"{other.name}, amx noise", draw=draw)
    return replace(
        other,
        name="amx" if other is REFERENCE else f"amx, {other.name}",
        linear=compiled.linear,
        add_norm=compiled.add_norm,
        rotate_and_write=compiled.rotate_and_write,
        gate=compiled.gate,
        attend=compiled.attend,
        draw=draw,
    )


def _on_cuda(task: Task) -> Kernels:
    """Without a wish for Triton, torch does what it cannot."""
    try:
        target = _find_target(task)
    except KernelsUnavailable as reason:
        if task.attention == "triton":
            raise
        log.warning("Triton: %s; using torch, which is several times slower", reason)
        return REFERENCE
    kernels = _triton(task, target)
    if task.attention == "torch":
        name = f"{kernels.name}, torch attention"
        return replace(kernels, name=name, attend=reference.attend, is_capturable=False)
    return kernels


def _triton(task: Task, target: Target, *, is_batch_invariant: bool = False) -> Kernels:
    # Where there is no Triton, its kernels cannot even be defined.
    from kernels.triton import fused, sampling
    from kernels.triton.attention import TritonAttention
    from kernels.triton.batch_invariant import InvariantLinears
    from kernels.triton.quantised import TritonQuantised

    linear = InvariantLinears(target).linear if is_batch_invariant else reference.linear
    products = TritonQuantised(target, task.dtype, linear, is_batch_invariant)
    return Kernels(
        name=f"triton {version('triton')}",
        linear=linear,
        add_norm=fused.add_norm,
        rotate_and_write=fused.rotate_and_write,
        gate=fused.gate,
        attend=TritonAttention(target, is_batch_invariant).attend,
        draw=sampling.draw,
        quantised=products.linear,
        is_capturable=True,
        is_batch_invariant=is_batch_invariant,
    )


def _with_triton_attention(task: Task, kernels: Kernels) -> Kernels:
    """On a CPU: interpreted, for whoever looks for a fault."""
    target = _find_target(task)
    from kernels.triton.attention import TritonAttention

    attention = TritonAttention(target, kernels.is_batch_invariant)
    return replace(kernels, name=f"{kernels.name}, interpreted triton attention", attend=attention.attend)


def _find_target(task: Task) -> Target:
    target = runtime.find_target(task.device)
    if task.has_fp8_kv and not target.has_fp8:
        raise KernelsUnavailable(
            "fp8 keys and values need compute capability 8.9, which this device has not; leave kv_cache_dtype or "
            "attention_backend at auto"
        )
    if task.head_dim > runtime.MAX_HEAD_DIM:
        raise KernelsUnavailable(f"heads have {task.head_dim} dimensions, {runtime.MAX_HEAD_DIM} is the most it takes")
    return target
