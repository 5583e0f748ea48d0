"""Attention over paged keys and values in plain torch.

KV memory is one tensor ``[num_blocks, num_layers, 2, block_size, kv_heads, head_dim]`` (keys at index 0 of the third
dimension, values at 1). Query heads are grouped: head h reads KV head h // (heads / kv_heads).
Knows shapes and strides; knows nothing of models, sequences or who owns a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.types import Ragged

_CHUNK_QUERIES = 512
"""Queries attended at once when a mask is needed: bounds the mask's memory."""


def write_kv(kv: Tensor, layer: int, blocks: Tensor, offsets: Tensor, new: Tensor) -> None:
    """Stores ``new [tokens, 2, kv_heads, head_dim]`` at ``offsets [tokens]`` of ``blocks [tokens]``."""
    kv[:, layer][blocks, :, offsets] = new


def attend(query: Tensor, kv: Tensor, layer: int, batch: Ragged, window: int | None, scale: float) -> Tensor:
    """Causal attention of a step's tokens over their own sequences' keys and values, which are written already.

    ``query [tokens, heads, head_dim]``; with a ``window`` a token sees itself and the window - 1 tokens before it.
    Returns ``[tokens, heads, head_dim]``.
    """
    outputs: list[Tensor] = []
    count = batch.num_decode
    if count:
        table, lengths = batch.block_table[:count, : batch.decode_width], batch.positions[:count] + 1
        outputs.append(attend_decode(query[:count], kv, layer, table, lengths, window, scale))
    for row, chunk in enumerate(batch.chunks, start=count):
        part = query[chunk.start : chunk.end]
        outputs.append(attend_chunk(part, kv, layer, batch.block_table[row], chunk.position, window, scale))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def attend_decode(
    query: Tensor, kv: Tensor, layer: int, block_table: Tensor, lengths: Tensor, window: int | None, scale: float
) -> Tensor:
    """One query per sequence against its ``lengths [rows]`` stored tokens, its own among them.

    ``query [rows, heads, head_dim]``; ``block_table [rows, max_blocks]``, padded with any valid block.
    Returns ``[rows, heads, head_dim]``.
    """
    rows, heads, head_dim = query.shape
    block_size, kv_heads = kv.shape[3:5]
    first = torch.zeros_like(lengths)
    if window is not None:
        first = (lengths - window).clamp_(min=0) // block_size
        most = min(block_table.shape[1], (window - 2) // block_size + 2)
        columns = first[:, None] + torch.arange(most, device=kv.device)
        block_table = block_table.gather(1, columns.clamp_(max=block_table.shape[1] - 1))
    width = block_table.shape[1] * block_size
    flat = block_table.reshape(-1)
    key, value = (
        kv[:, layer, part].index_select(0, flat).view(rows, width, kv_heads, head_dim).transpose(1, 2)
        for part in (0, 1)
    )
    position = torch.arange(width, device=kv.device) + first[:, None] * block_size
    visible = position < lengths[:, None]
    if window is not None:
        visible &= position >= (lengths - window)[:, None]
    mask = visible[:, None, None, :]
    grouped = query.view(rows, kv_heads, heads // kv_heads, head_dim)
    return F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale).view(rows, heads, head_dim)


def attend_chunk(
    query: Tensor, kv: Tensor, layer: int, blocks: Tensor, start: int, window: int | None, scale: float
) -> Tensor:
    """Consecutive queries of one sequence, the first at position ``start``, against the tokens up to each of them.

    ``query [tokens, heads, head_dim]``; ``blocks`` hold positions 0 to start + tokens - 1 at least, the chunk's own
    among them. Returns ``[tokens, heads, head_dim]``.
    """
    tokens, block_size = query.shape[0], kv.shape[3]
    end = start + tokens
    if start == 0 and (window is None or tokens <= window):
        key, value = _gather(kv, layer, blocks, 0, end)
        return _attend(query, key, value, None, scale)
    if tokens > _CHUNK_QUERIES:
        parts = range(0, tokens, _CHUNK_QUERIES)
        return torch.cat(
            [attend_chunk(query[p : p + _CHUNK_QUERIES], kv, layer, blocks, start + p, window, scale) for p in parts]
        )
    first = 0 if window is None else max(0, start - window + 1) // block_size * block_size
    key, value = _gather(kv, layer, blocks, first, end)
    query_at = torch.arange(start, end, device=kv.device)[:, None]
    key_at = torch.arange(first, end, device=kv.device)
    visible = key_at <= query_at
    if window is not None:
        visible &= key_at > query_at - window
    return _attend(query, key, value, visible, scale)


def _gather(kv: Tensor, layer: int, blocks: Tensor, first: int, end: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[kv_heads, end - first, head_dim]`` of positions first to end - 1; first is a block's start."""
    block_size, kv_heads, head_dim = kv.shape[3:]
    chosen = blocks[first // block_size : -(-end // block_size)]
    key, value = (
        kv[:, layer, part].index_select(0, chosen).view(-1, kv_heads, head_dim)[: end - first].transpose(0, 1)
        for part in (0, 1)
    )
    return key, value


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Heads of one KV head share its keys by a stride of 0, so nothing is repeated. No mask means causal."""
    tokens, heads, head_dim = query.shape
    kv_heads, width, _ = key.shape
    grouped = query.view(tokens, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
    shared = (kv_heads, heads // kv_heads, width, head_dim)
    out = F.scaled_dot_product_attention(
        grouped,
        key[:, None].expand(shared),
        value[:, None].expand(shared),
        attn_mask=visible,
        is_causal=visible is None,
        scale=scale,
    )
    return out.permute(2, 0, 1, 3).reshape(tokens, heads, head_dim)
