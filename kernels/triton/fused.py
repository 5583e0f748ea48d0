"""Norm, rotation with the KV write, and gate by Triton, behind the signatures of ``kernels.reference``.

One pass over memory each, and a token's result depends on no other token. Makes no host wait for the device.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.triton import fused_kernels
from kernels.types import HeadNorm, PagedKv, Places

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")

_HEADS_AT_ONCE = 8
_COLUMNS_AT_ONCE = 1024


def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    assert x.stride(1) == 1
    assert residual is None or residual.stride(1) == 1
    tokens, n = x.shape
    out = torch.empty((tokens, n), dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    if tokens:
        block = triton.next_power_of_2(n)
        fused_kernels.add_norm[(tokens,)](
            x,
            x if residual is None else residual,
            weight,
            out,
            total,
            eps,
            x.stride(0),
            x.stride(0) if residual is None else residual.stride(0),
            N=n,
            BLOCK=block,
            HAS_RESIDUAL=residual is not None,
            num_warps=min(16, max(1, block // 512)),
        )
    return out, total


def rotate_and_write(qkv: Tensor, norm: HeadNorm | None, places: Places, kv: PagedKv, layer: int) -> Tensor:
    assert qkv.stride(2) == 1
    assert places.cos.is_contiguous()
    assert places.sin.is_contiguous()
    tokens, all_heads, head_dim = qkv.shape
    data = kv.data[:, layer]
    kv_heads = data.shape[3]
    heads = all_heads - 2 * kv_heads
    scales = None if kv.scales is None else kv.scales[:, layer]
    query = torch.empty((tokens, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if tokens:
        fused_kernels.rotate_and_write[(tokens, triton.cdiv(all_heads, _HEADS_AT_ONCE))](
            qkv,
            query if norm is None else norm.weight,
            places.cos,
            places.sin,
            places.blocks,
            places.offsets,
            query,
            data,
            data if scales is None else scales,
            0.0 if norm is None else norm.eps,
            qkv.stride(0),
            qkv.stride(1),
            *data.stride()[:4],
            *((0, 0, 0, 0) if scales is None else scales.stride()),
            HEADS=heads,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_HEADS=_HEADS_AT_ONCE,
            BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
            HAS_NORM=norm is not None,
            HAS_SCALES=scales is not None,
            num_warps=4,
        )
    return query


def gate(x: Tensor, activation: str) -> Tensor:
    assert activation in ACTIVATIONS
    assert x.stride(1) == 1
    tokens, width = x.shape
    inner = width // 2
    out = torch.empty((tokens, inner), dtype=x.dtype, device=x.device)
    if tokens:
        fused_kernels.gate[(tokens, triton.cdiv(inner, _COLUMNS_AT_ONCE))](
            x, out, x.stride(0), INNER=inner, BLOCK=_COLUMNS_AT_ONCE, ACTIVATION=activation, num_warps=4
        )
    return out
