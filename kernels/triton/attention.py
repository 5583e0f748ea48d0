"""Paged attention by Triton behind the signature of ``kernels.reference.attend``: which tiles, how many splits.

A step's decode rows go to one launch whose keys are split over enough programs to fill the device; its chunks to
another with tall tiles. Batch-invariant attention is one launch for both, without splits: a token's sums then have one
order, be it computed in a chunk or alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import triton
from torch import Tensor

from kernels.alignment import aligned
from kernels.triton import attention_kernels
from kernels.triton.runtime import Target
from kernels.types import AttentionSpec, PagedKv, Ragged

MAX_SPLITS = 64
_DECODE_WAVES = 8
"""Programs per processor that splitting aims at: many short ones end together, and each still reads whole tiles."""
_CHUNK_WAVES = 1
"""Less for chunks: a tall tile keeps a processor busy by itself, and what its splits found is much to merge."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """``rows`` (query heads x tokens) against ``keys`` at once, by ``warps``, ``stages`` tiles in flight."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class _Launch:
    """Rows ``first_row`` on, whose tokens are ``first_token`` on; ``is_decode``: each has one token."""

    first_row: int
    num_rows: int
    first_token: int
    num_tokens: int
    is_decode: bool
    tiles: Tiles


@dataclass(frozen=True, slots=True)
class TritonAttention:
    """``attend`` is as ``kernels.reference.attend``. Makes no host wait for the device."""

    target: Target
    is_batch_invariant: bool = False

    def attend(self, query: Tensor, kv: PagedKv, layer: int, batch: Ragged, spec: AttentionSpec) -> Tensor:
        tokens, heads, head_dim = query.shape
        out = torch.empty((tokens, heads, head_dim), dtype=query.dtype, device=query.device)
        shape = (heads // kv.data.shape[4], head_dim, query.dtype, kv.scales is not None)
        num_rows, count = batch.positions.shape[0], batch.num_decode
        if self.is_batch_invariant:
            launches = [_Launch(0, num_rows, 0, tokens, False, invariant_tiles(*shape, self.target.is_roomy))]
        else:
            launches = [
                _Launch(0, count, 0, count, True, decode_tiles(*shape)),
                _Launch(
                    count, num_rows - count, count, tokens - count, False, chunk_tiles(*shape, self.target.is_roomy)
                ),
            ]
        for launch in launches:
            if launch.num_rows:
                self._run(launch, query, kv, layer, batch, spec, out)
        return out

    def _run(
        self,
        launch: _Launch,
        query: Tensor,
        kv: PagedKv,
        layer: int,
        batch: Ragged,
        spec: AttentionSpec,
        out: Tensor,
    ) -> None:
        _, heads, head_dim = query.shape
        data, tiles = kv.data[:, layer], launch.tiles
        block_size, kv_heads = data.shape[2:4]
        scales = data
        if kv.scales is not None:
            data, scales = data.view(torch.int16), kv.scales[:, layer]
        group = heads // kv_heads
        tile_tokens = tiles.rows // group
        num_tiles = launch.num_rows
        if not launch.is_decode:
            num_tiles += launch.num_tokens // tile_tokens
        width = batch.decode_width if launch.is_decode else batch.block_table.shape[1]
        splits = 1
        if not self.is_batch_invariant:
            waves = _DECODE_WAVES if launch.is_decode else _CHUNK_WAVES
            room = waves * self.target.num_sms // (num_tiles * kv_heads)
            splits = num_splits(room, width * block_size, tiles.keys, spec.window)
        partial = _Partial.make(query, splits)
        attention_kernels.attend[(kv_heads, num_tiles, splits)](
            query,
            data,
            scales,
            batch.block_table,
            batch.query_starts,
            batch.positions,
            out,
            partial.out,
            partial.largest,
            partial.sum,
            launch.first_row,
            launch.first_token,
            launch.num_rows,
            splits,
            batch.block_table.stride(0),
            spec.scale,
            query.stride(0),
            query.stride(1),
            out.stride(0),
            out.stride(1),
            data.stride(0),
            data.stride(1),
            data.stride(2),
            data.stride(3),
            *scales.stride()[:4],
            GROUP=group,
            WINDOW=spec.window or 0,
            SOFT_CAP=spec.soft_cap or 0.0,
            BLOCK_SIZE=block_size,
            HEAD_DIM=head_dim,
            BLOCK_D=max(32, triton.next_power_of_2(head_dim)),
            BLOCK_M=tiles.rows,
            BLOCK_Q=tile_tokens,
            BLOCK_N=tiles.keys,
            HAS_SCALES=kv.scales is not None,
            IS_INTERPRETED=self.target.is_interpreted,
            IS_SPLIT=splits > 1,
            IS_DECODE=launch.is_decode,
            HAS_SHORTCUT=spec.window is None and not self.is_batch_invariant,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        if splits > 1:
            attention_kernels.merge[(launch.num_tokens, heads)](
                partial.out,
                partial.largest,
                partial.sum,
                out,
                launch.first_token,
                splits,
                out.stride(0),
                out.stride(1),
                HEAD_DIM=head_dim,
                BLOCK_D=triton.next_power_of_2(head_dim),
                MAX_SPLITS=MAX_SPLITS,
            )


@dataclass(frozen=True, slots=True)
class _Partial:
    """What splits found, float32: weighted sums ``[tokens, heads, splits, head_dim]``, and ``[tokens, heads, splits]``
    each the largest score and the sum of weights."""

    out: Tensor
    largest: Tensor
    sum: Tensor

    @classmethod
    def make(cls, query: Tensor, splits: int) -> _Partial:
        """Empty where one program sees all keys."""
        tokens, heads, head_dim = query.shape
        shape = (tokens if splits > 1 else 0, heads, splits)
        count = prod(shape)
        sizes = [aligned(size, torch.float32) for size in (count * head_dim, count, count)]
        return cls(*torch.empty(sum(sizes), dtype=torch.float32, device=query.device).split_with_sizes(sizes))


def num_splits(room: int, context: int, tile_keys: int, window: int | None) -> int:
    """Parts to cut the keys into: ``room`` for as many, but none smaller than a tile.

    ``context``: keys that the widest row may have. It follows from shapes alone, never from lengths, so that a captured
    graph may replay it on any.
    """
    if window is not None:
        context = min(context, window + tile_keys)
    most = min(MAX_SPLITS, -(-context // tile_keys))
    return max(1, min(most, room))


def decode_tiles(group: int, head_dim: int, dtype: torch.dtype, is_fp8: bool) -> Tiles:
    """A tile's keys are copied while the ones before it are weighed: large enough to keep the memory busy."""
    rows = _rows(16, group)
    if dtype == torch.float32:
        return Tiles(rows, keys=16, warps=4, stages=2)
    if head_dim > 128:
        return Tiles(rows, keys=64 if is_fp8 else 32, warps=4, stages=3)
    return Tiles(rows, keys=128 if is_fp8 else 64, warps=4, stages=3)


def chunk_tiles(group: int, head_dim: int, dtype: torch.dtype, is_fp8: bool, is_roomy: bool) -> Tiles:
    """Each key is read once for many rows: large enough to keep the matrix units busy."""
    if dtype == torch.float32:
        return Tiles(_rows(16, group), keys=16, warps=4, stages=2)
    if head_dim > 128:
        wide = Tiles(_rows(128, group), keys=32 if is_fp8 else 64, warps=8, stages=2)
        return wide if is_roomy else Tiles(_rows(64, group), keys=32, warps=4, stages=2)
    return Tiles(_rows(128, group), keys=64, warps=8, stages=3)


def invariant_tiles(group: int, head_dim: int, dtype: torch.dtype, is_fp8: bool, is_roomy: bool) -> Tiles:
    """One for decode rows and chunks alike."""
    if dtype == torch.float32:
        return Tiles(_rows(16, group), keys=16, warps=4, stages=2)
    if head_dim > 128:
        return Tiles(_rows(64, group), keys=32, warps=4, stages=3 if is_roomy else 2)
    return Tiles(_rows(64, group), keys=64, warps=4, stages=3)


def _rows(least: int, group: int) -> int:
    """A tile holds a token's whole group of heads."""
    return max(least, int(triton.next_power_of_2(group)))
