"""Norms with the addition before them, and what becomes of a step's heads before attention, in plain torch.

Compiled kernels that have a norm and a rotation of their own, but no fused ones, put them together here.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, stack

from kernels.reference.attention import write_kv
from kernels.reference.elementwise import rms_norm, rotate
from kernels.types import HeadNorm, PagedKv, Places


def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream ``residual + x`` (None: ``x`` begins it), as ``(its norm, itself)``, both ``[tokens, n]``."""
    total = x if residual is None else residual + x
    return rms_norm(total, weight, eps), total


def rotate_and_write(qkv: Tensor, norm: HeadNorm | None, places: Places, kv: PagedKv, layer: int) -> Tensor:
    """Turns the heads of queries and keys, and stores keys and values where ``places`` says.

    ``qkv [tokens, heads + 2 * kv_heads, head_dim]`` holds queries, keys and values. Query and key heads are normed
    first if there is a ``norm``. Returns the queries ``[tokens, heads, head_dim]``.
    """
    return rotate_and_write_by(rms_norm, rotate, qkv, norm, places, kv, layer)


def rotate_and_write_by(
    rms_norm: Callable[[Tensor, Tensor, float], Tensor],
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor],
    qkv: Tensor,
    norm: HeadNorm | None,
    places: Places,
    kv: PagedKv,
    layer: int,
) -> Tensor:
    """``rotate_and_write`` of two functions as ``kernels.reference.elementwise`` has them."""
    kv_heads = kv.data.shape[4]
    rotated = qkv[:, :-kv_heads]
    if norm is not None:
        rotated = rms_norm(rotated, norm.weight, norm.eps)
    rotated = rotate(rotated, places.cos, places.sin)
    new = stack((rotated[:, -kv_heads:], qkv[:, -kv_heads:]), 1)
    write_kv(kv, layer, places.blocks, places.offsets, new)
    return rotated[:, :-kv_heads]
