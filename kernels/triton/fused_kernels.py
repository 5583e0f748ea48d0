"""What lies between the matrices, as Triton programs: norm, rotation with the KV write, gate; float32 inside.

Numbers are rounded to the model's type wherever the reference rounds them, so both store the same bytes up to the last
bit of a root or an exponential. Knows pointers and strides; which programs to start is ``kernels.triton.fused``'s.
"""

from __future__ import annotations

import triton
import triton.language as tl

FP8_MAX: tl.constexpr = tl.constexpr(448.0)
SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
SQRT_2_OVER_PI: tl.constexpr = tl.constexpr(0.7978845608028654)


@triton.jit
def add_norm(
    x,
    residual,
    weight,
    out,
    total,
    eps,
    x_stride,
    residual_stride,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Grid: (tokens). ``out`` and, with ``HAS_RESIDUAL``, ``total`` [tokens, N] are written."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    exists = columns < N
    number = tl.load(x + token * x_stride + columns, mask=exists, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        number += tl.load(residual + token * residual_stride + columns, mask=exists, other=0.0).to(tl.float32)
        rounded = number.to(total.dtype.element_ty)
        tl.store(total + token * N + columns, rounded, mask=exists)
        number = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(number * number, 0) / N + eps)
    factor = tl.load(weight + columns, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + token * N + columns, (number * scale * factor).to(out.dtype.element_ty), mask=exists)


@triton.jit
def rotate_and_write(
    qkv,
    norm,
    cos,
    sin,
    blocks,
    offsets,
    query,
    data,
    scales,
    eps,
    qkv_token_stride,
    qkv_head_stride,
    block_stride,
    part_stride,
    slot_stride,
    head_stride,
    scale_block_stride,
    scale_part_stride,
    scale_head_stride,
    scale_slot_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """Grid: (tokens, tiles of ``BLOCK_HEADS`` heads). ``data`` and ``scales`` begin at the layer's keys; ``query``
    [tokens, HEADS, HEAD_DIM]; ``norm`` [HEADS + KV_HEADS, HEAD_DIM]. Each head is two halves, whose numbers are pairs.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    half: tl.constexpr = HEAD_DIM // 2
    lane = tl.arange(0, BLOCK_HALF)
    is_rotated = head < HEADS + KV_HEADS
    exists = (head < HEADS + 2 * KV_HEADS)[:, None] & (lane < half)[None, :]
    place = qkv + token * qkv_token_stride + head[:, None] * qkv_head_stride + lane[None, :]
    left = tl.load(place, mask=exists, other=0.0).to(tl.float32)
    right = tl.load(place + half, mask=exists, other=0.0).to(tl.float32)
    stored = query.dtype.element_ty

    if HAS_NORM:
        mean = (tl.sum(left * left, 1) + tl.sum(right * right, 1)) / HEAD_DIM
        scale = (1.0 / tl.sqrt_rn(mean + eps))[:, None]
        weights = norm + head[:, None] * HEAD_DIM + lane[None, :]
        has_weight = exists & is_rotated[:, None]
        left_weight = tl.load(weights, mask=has_weight, other=0.0).to(tl.float32)
        right_weight = tl.load(weights + half, mask=has_weight, other=0.0).to(tl.float32)
        left = tl.where(is_rotated[:, None], (left * scale * left_weight).to(stored).to(tl.float32), left)
        right = tl.where(is_rotated[:, None], (right * scale * right_weight).to(stored).to(tl.float32), right)

    angle = token * HEAD_DIM + lane
    in_half = lane < half
    left_cos = tl.load(cos + angle, mask=in_half, other=0.0)[None, :]
    right_cos = tl.load(cos + angle + half, mask=in_half, other=0.0)[None, :]
    left_sin = tl.load(sin + angle, mask=in_half, other=0.0)[None, :]
    right_sin = tl.load(sin + angle + half, mask=in_half, other=0.0)[None, :]
    turned_left = left * left_cos + right * left_sin
    turned_right = right * right_cos + left * right_sin
    left = tl.where(is_rotated[:, None], turned_left, left).to(stored)
    right = tl.where(is_rotated[:, None], turned_right, right).to(stored)

    is_query = exists & (head < HEADS)[:, None]
    query_place = query + (token * HEADS + head[:, None]) * HEAD_DIM + lane[None, :]
    tl.store(query_place, left, mask=is_query)
    tl.store(query_place + half, right, mask=is_query)

    is_kv = (head >= HEADS) & (head < HEADS + 2 * KV_HEADS)
    part = tl.where(is_rotated, 0, 1)
    kv_head = tl.where(is_kv, head - HEADS - part * KV_HEADS, 0)
    block = tl.load(blocks + token)
    slot = tl.load(offsets + token)
    if HAS_SCALES:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
        # A maximum passes over what is no number; an infinite scale makes what is read no number, or infinite, again.
        left_size = tl.where(left == left, tl.abs(left), float("inf"))
        right_size = tl.where(right == right, tl.abs(right), float("inf"))
        largest = tl.maximum(tl.max(left_size, 1), tl.max(right_size, 1))
        scale = tl.div_rn(largest, FP8_MAX)
        divisor = tl.where(scale == 0.0, 1.0, scale)[:, None] + tl.zeros_like(left)
        left = tl.minimum(tl.maximum(tl.div_rn(left, divisor), -FP8_MAX), FP8_MAX)
        right = tl.minimum(tl.maximum(tl.div_rn(right, divisor), -FP8_MAX), FP8_MAX)
        scale_place = scales + block * scale_block_stride + slot * scale_slot_stride
        tl.store(scale_place + part * scale_part_stride + kv_head * scale_head_stride, scale, mask=is_kv)
    kv_place = data + block * block_stride + slot * slot_stride + lane[None, :]
    kv_place += (part * part_stride + kv_head * head_stride)[:, None]
    is_stored = exists & is_kv[:, None]
    tl.store(kv_place, left.to(data.dtype.element_ty), mask=is_stored)
    tl.store(kv_place + half, right.to(data.dtype.element_ty), mask=is_stored)


@triton.jit
def gate(x, out, x_stride, INNER: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    """Grid: (tokens, tiles of ``BLOCK`` columns). ``x`` [tokens, 2 * INNER], ``out`` [tokens, INNER]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < INNER
    place = x + token * x_stride + column
    left = tl.load(place, mask=exists, other=0.0).to(tl.float32)
    right = tl.load(place + INNER, mask=exists, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        active = left / (1.0 + tl.exp(-left))
    elif ACTIVATION == "gelu":
        active = 0.5 * left * (1.0 + tl.erf(left * SQRT_HALF))
    else:
        # tanh(y) = 1 - 2 / (e^2y + 1), which is right at both ends.
        inner = SQRT_2_OVER_PI * (left + 0.044715 * left * left * left)
        active = 0.5 * left * (2.0 - 2.0 / (tl.exp(2.0 * inner) + 1.0))
    stored = out.dtype.element_ty
    tl.store(out + token * INNER + column, (active.to(stored).to(tl.float32) * right).to(stored), mask=exists)
