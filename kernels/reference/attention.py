"""Attention over paged keys and values in plain torch.

Query heads are grouped: head h reads KV head h // (heads / kv_heads). fp8 keys and values are widened to the query's
type when they are read. Knows shapes and strides; knows nothing of models, sequences or who owns a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.types import AttentionSpec, PagedKv, Ragged

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0

_CHUNK_QUERIES = 512
"""Queries attended at once when a mask is needed: bounds the mask's memory."""


def write_kv(kv: PagedKv, layer: int, blocks: Tensor, offsets: Tensor, new: Tensor) -> None:
    """Stores ``new [tokens, 2, kv_heads, head_dim]`` at ``offsets [tokens]`` of ``blocks [tokens]``."""
    if kv.scales is None:
        kv.data[:, layer][blocks, :, offsets] = new
        return
    data, scales = quantise_kv(new)
    # Few operations know fp8: bytes are stored.
    kv.data.view(torch.uint8)[:, layer][blocks, :, offsets] = data.view(torch.uint8)
    kv.scales[:, layer][blocks, :, :, offsets] = scales


def quantise_kv(new: Tensor) -> tuple[Tensor, Tensor]:
    """``new [..., head_dim]`` as fp8, and the float32 factors ``[...]`` it was divided by.

    The largest number of each token and head becomes the largest of fp8. So a token's bytes follow from the token
    alone: a factor for a whole block would change, or be wrong, when the block's next token is larger than the first,
    and then the bytes would depend on how the prompt was cut into chunks.
    """
    wide = new.float()
    scales = wide.abs().amax(-1) / FP8_MAX
    divisor = scales.masked_fill(scales == 0, 1.0)
    return (wide / divisor[..., None]).clamp_(-FP8_MAX, FP8_MAX).to(FP8), scales


def attend(query: Tensor, kv: PagedKv, layer: int, batch: Ragged, spec: AttentionSpec) -> Tensor:
    """Causal attention of a step's tokens over their own sequences' keys and values, which are written already.

    ``query [tokens, heads, head_dim]``. Returns ``[tokens, heads, head_dim]``.
    """
    outputs: list[Tensor] = []
    count = batch.num_decode
    if count:
        table, lengths = batch.block_table[:count, : batch.decode_width], batch.positions[:count] + 1
        outputs.append(attend_decode(query[:count], kv, layer, table, lengths, spec))
    for row, chunk in enumerate(batch.chunks, start=count):
        part = query[chunk.start : chunk.end]
        outputs.append(attend_chunk(part, kv, layer, batch.block_table[row], chunk.position, spec))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def attend_decode(
    query: Tensor, kv: PagedKv, layer: int, block_table: Tensor, lengths: Tensor, spec: AttentionSpec
) -> Tensor:
    """One query per sequence against its ``lengths [rows]`` stored tokens, its own among them.

    ``query [rows, heads, head_dim]``; ``block_table [rows, max_blocks]``, padded with any valid block.
    Returns ``[rows, heads, head_dim]``.
    """
    rows, heads, head_dim = query.shape
    block_size, kv_heads = kv.data.shape[3:5]
    first, window = torch.zeros_like(lengths), spec.window
    if window is not None:
        first = (lengths - window).clamp_(min=0) // block_size
        most = min(block_table.shape[1], (window - 2) // block_size + 2)
        columns = first[:, None] + torch.arange(most, device=query.device)
        block_table = block_table.gather(1, columns.clamp_(max=block_table.shape[1] - 1))
    width = block_table.shape[1] * block_size
    key, value = (
        each.view(rows, width, kv_heads, head_dim).transpose(1, 2)
        for each in _read(kv, layer, block_table.reshape(-1), query.dtype)
    )
    position = torch.arange(width, device=query.device) + first[:, None] * block_size
    visible = position < lengths[:, None]
    if window is not None:
        visible &= position >= (lengths - window)[:, None]
    # What is not seen may be no number, and then nothing times it is none.
    for each in (key, value):
        each.masked_fill_(~visible[:, None, :, None], 0)
    grouped = query.view(rows, kv_heads, heads // kv_heads, head_dim)
    return _softmax_sum(grouped, key, value, visible[:, None, None, :], spec).view(rows, heads, head_dim)


def attend_chunk(query: Tensor, kv: PagedKv, layer: int, blocks: Tensor, start: int, spec: AttentionSpec) -> Tensor:
    """Consecutive queries of one sequence, the first at position ``start``, against the tokens up to each of them.

    ``query [tokens, heads, head_dim]``; ``blocks`` hold positions 0 to start + tokens - 1 at least, the chunk's own
    among them. Returns ``[tokens, heads, head_dim]``.
    """
    tokens, block_size, window = query.shape[0], kv.data.shape[3], spec.window
    end = start + tokens
    if start == 0 and (window is None or tokens <= window) and spec.soft_cap is None:
        key, value = _gather(kv, layer, blocks, 0, end, query.dtype)
        return _attend(query, key, value, None, spec)
    if tokens > _CHUNK_QUERIES:
        parts = [(query[p : p + _CHUNK_QUERIES], start + p) for p in range(0, tokens, _CHUNK_QUERIES)]
        return torch.cat([attend_chunk(part, kv, layer, blocks, first, spec) for part, first in parts])
    first = 0 if window is None else max(0, start - window + 1) // block_size * block_size
    key, value = _gather(kv, layer, blocks, first, end, query.dtype)
    query_at = torch.arange(start, end, device=query.device)[:, None]
    key_at = torch.arange(first, end, device=query.device)
    visible = key_at <= query_at
    if window is not None:
        visible &= key_at > query_at - window
    return _attend(query, key, value, visible, spec)


def widen_kv(kv: PagedKv, layer: int, blocks: Tensor) -> Tensor:
    """fp8 keys and values of ``blocks [n]``, float32 ``[n, 2, block_size, kv_heads, head_dim]``."""
    assert kv.scales is not None, "only fp8 is widened"
    data = kv.data.view(torch.uint8)[:, layer].index_select(0, blocks).view(FP8)
    scales = kv.scales[:, layer].index_select(0, blocks)
    return data.float() * scales.transpose(2, 3)[..., None]


def _read(kv: PagedKv, layer: int, blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of ``blocks [n]``, each ``[n, block_size, kv_heads, head_dim]`` of ``dtype``."""
    if kv.scales is None:
        return kv.data[:, layer, 0].index_select(0, blocks), kv.data[:, layer, 1].index_select(0, blocks)
    key, value = widen_kv(kv, layer, blocks).to(dtype).unbind(1)
    return key.contiguous(), value.contiguous()


def _gather(kv: PagedKv, layer: int, blocks: Tensor, first: int, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values ``[kv_heads, end - first, head_dim]`` of positions first to end - 1; first is a block's start."""
    block_size, kv_heads, head_dim = kv.data.shape[3:]
    chosen = blocks[first // block_size : -(-end // block_size)]
    key, value = (
        each.view(-1, kv_heads, head_dim)[: end - first].transpose(0, 1) for each in _read(kv, layer, chosen, dtype)
    )
    return key, value


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, spec: AttentionSpec) -> Tensor:
    """Heads of one KV head share its keys by a stride of 0, so nothing is repeated. No mask means causal."""
    tokens, heads, head_dim = query.shape
    kv_heads, width, _ = key.shape
    grouped = query.view(tokens, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
    shared = (kv_heads, heads // kv_heads, width, head_dim)
    out = _softmax_sum(grouped, key[:, None].expand(shared), value[:, None].expand(shared), visible, spec)
    return out.permute(2, 0, 1, 3).reshape(tokens, heads, head_dim)


def _softmax_sum(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, spec: AttentionSpec) -> Tensor:
    """``softmax(scores) @ value`` over the last two dimensions. ``visible`` is the mask; None means causal."""
    if spec.soft_cap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, is_causal=visible is None, scale=spec.scale
        )
    assert visible is not None, "torch's causal shortcut has no soft cap"
    scores = spec.soft_cap * torch.tanh(query.float() @ key.float().transpose(-1, -2) * (spec.scale / spec.soft_cap))
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return (weights @ value.float()).to(query.dtype)
