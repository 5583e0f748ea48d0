"""Triton's attention against the reference in float32: on a GPU as it is, elsewhere in Triton's interpreter.

Shapes are small: the interpreter takes some milliseconds for each tile of each program.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from kernels import reference
from kernels.reference.attention import FP8
from kernels.types import AttentionSpec, ChunkSpan, PagedKv, Ragged

pytest.importorskip("triton")

from kernels.triton import attention
from kernels.triton.attention import TritonAttention, num_splits
from kernels.triton.runtime import find_target
from tests.support.launches import Launches

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TARGET = find_target(DEVICE)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
LAYERS, LAYER = 3, 1


@dataclass
class World:
    """A step over paged memory. ``lengths``: (tokens before, tokens in this step) per row, decode rows first."""

    lengths: list[tuple[int, int]]
    kv_heads: int
    group: int
    head_dim: int
    block_size: int
    dtype: torch.dtype = torch.float32
    is_fp8: bool = False

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        widths = [-(-(before + tokens) // self.block_size) for before, tokens in self.lengths]
        num_blocks = sum(widths) + 1
        order = torch.randperm(num_blocks - 1) + 1
        self.tables = torch.zeros(len(widths), max(widths), dtype=torch.int64, device=DEVICE)
        for row, width in enumerate(widths):
            self.tables[row, :width], order = order[:width].to(DEVICE), order[width:]
        self.kv = make_kv(self, num_blocks)
        heads = self.kv_heads * self.group
        tokens = sum(tokens for _, tokens in self.lengths)
        self.query = torch.randn(tokens, heads + self.kv_heads, self.head_dim).to(self.dtype).to(DEVICE)[:, :heads]

    def batch(self) -> Ragged:
        return make_batch(self.lengths, self.tables)

    def expected(self, spec: AttentionSpec) -> torch.Tensor:
        data = self.kv.data if self.is_fp8 else self.kv.data.float()
        return reference.attend(self.query.float(), PagedKv(data, self.kv.scales), LAYER, self.batch(), spec)


def make_batch(lengths: list[tuple[int, int]], tables: torch.Tensor) -> Ragged:
    starts = torch.tensor([0] + [tokens for _, tokens in lengths]).cumsum(0).to(DEVICE)
    num_decode = sum(tokens == 1 for _, tokens in lengths)
    spans = [ChunkSpan(int(starts[row]), int(starts[row + 1]), before) for row, (before, _) in enumerate(lengths)]
    positions = torch.tensor([before for before, _ in lengths], device=DEVICE)
    return Ragged(starts, positions, tables, num_decode, tables.shape[1], tuple(spans[num_decode:]))


def make_kv(world: World, num_blocks: int) -> PagedKv:
    """Blocks are further apart than they are long, as they are where something lies behind their keys and values."""
    inner = (LAYERS, 2, world.block_size, world.kv_heads, world.head_dim)
    size = torch.Size(inner).numel()
    dtype = torch.uint8 if world.is_fp8 else world.dtype
    data = torch.zeros(num_blocks, size + 32, dtype=dtype, device=DEVICE)[:, :size].view(num_blocks, *inner)
    if not world.is_fp8:
        return PagedKv(data.copy_(torch.randn(data.shape)))
    scales = torch.zeros(num_blocks, LAYERS, 2, world.kv_heads, world.block_size, device=DEVICE)
    kv = PagedKv(data.view(FP8), scales)
    slots = torch.arange(num_blocks * world.block_size, device=DEVICE)
    for layer in range(LAYERS):
        new = torch.randn(len(slots), 2, world.kv_heads, world.head_dim) * torch.rand(len(slots), 2, 1, 1) * 3
        reference.write_kv(kv, layer, slots // world.block_size, slots % world.block_size, new.to(DEVICE))
    return kv


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.isfinite(found).all()
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)


MIXED = [(0, 1), (140, 1), (0, 37), (70, 12)]


@pytest.mark.parametrize("is_batch_invariant", [False, True])
@pytest.mark.parametrize(
    "world",
    [
        World(MIXED, 2, 3, 16, 16),
        World(MIXED, 1, 1, 40, 48),
        World(MIXED, 1, 7, 64, 16, torch.float16),
        World(MIXED, 2, 4, 32, 8, torch.bfloat16),
        World(MIXED, 1, 2, 16, 1, torch.bfloat16),
        World(MIXED, 2, 3, 48, 16, torch.float16, is_fp8=True),
        World(MIXED, 1, 4, 64, 16, torch.bfloat16, is_fp8=True),
        World(MIXED, 1, 2, 20, 16, torch.float32, is_fp8=True),
    ],
    ids=lambda world: f"{world.dtype}{'-fp8' * world.is_fp8}-{world.head_dim}".removeprefix("torch."),
)
def test_equals_the_reference(world: World, is_batch_invariant: bool) -> None:
    spec = AttentionSpec(world.head_dim**-0.5)
    found = TritonAttention(TARGET, is_batch_invariant).attend(world.query, world.kv, LAYER, world.batch(), spec)
    assert (found.dtype, found.shape) == (world.dtype, world.query.shape)
    close(found, world.expected(spec))


@pytest.mark.parametrize("is_batch_invariant", [False, True])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("window", [1, 24, 100])
def test_windows_and_soft_caps(window: int, soft_cap: float | None, is_batch_invariant: bool) -> None:
    world = World([(120, 1), (0, 30), (90, 9)], 1, 2, 16, 16, torch.float16)
    spec = AttentionSpec(1.5, window, soft_cap)
    found = TritonAttention(TARGET, is_batch_invariant).attend(world.query, world.kv, LAYER, world.batch(), spec)
    close(found, world.expected(spec))


@pytest.mark.parametrize("seed", range(6))
def test_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    lengths = [(rng.randrange(140), 1) for _ in range(rng.randrange(4))]
    lengths += [(rng.randrange(80), rng.randrange(2, 40)) for _ in range(rng.randrange(1, 3))]
    dtype = rng.choice(list(TOLERANCE))
    group, head_dim, block_size = rng.randrange(1, 6), rng.randrange(2, 49, 2), rng.choice((1, 4, 12, 16, 96))
    world = World(lengths, rng.randrange(1, 3), group, head_dim, block_size, dtype, rng.random() < 0.5)
    spec = AttentionSpec(head_dim**-0.5, rng.choice((None, 5, 64)), rng.choice((None, 1.0)))
    found = TritonAttention(TARGET).attend(world.query, world.kv, LAYER, world.batch(), spec)
    close(found, world.expected(spec))


@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_invariant_attention_has_the_same_bits_alone_in_a_batch_and_in_chunks(dtype: torch.dtype, is_fp8: bool) -> None:
    world = World([(90, 1), (3, 1), (0, 50)], 1, 3, 16, 16, dtype, is_fp8)
    attention = TritonAttention(TARGET, is_batch_invariant=True)
    for spec in (AttentionSpec(0.25), AttentionSpec(0.25, 40, 3.0)):
        whole = attention.attend(world.query, world.kv, LAYER, world.batch(), spec)
        for row, first, count in ((0, 0, 1), (1, 0, 1), (2, 0, 1), (2, 49, 1), (2, 23, 27)):
            alone = make_batch([(world.lengths[row][0] + first, count)], world.tables[row : row + 1])
            place = int(world.batch().query_starts[row]) + first
            found = attention.attend(world.query[place : place + count], world.kv, LAYER, alone, spec)
            assert torch.equal(found, whole[place : place + count]), (row, first, count)


def test_one_program_attends_and_one_merges_for_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    attend, merge = Launches(), Launches()
    monkeypatch.setattr(attention, "attention_kernels", SimpleNamespace(attend=attend, merge=merge))
    for rows in (1, 2, 3, 5):
        world = World([(200, 1)] * rows, 1, 3, 20, 16)
        TritonAttention(TARGET).attend(world.query, world.kv, LAYER, world.batch(), AttentionSpec(1.0))
    assert len(attend.tensors) == len(merge.tensors) == 4, "each was split"
    assert merge.are_aligned
    assert Launches([launch[-3:] for launch in attend.tensors]).are_aligned


def test_nothing_beyond_a_sequence_is_read() -> None:
    world = World([(20, 1), (0, 21)], 1, 2, 16, 16)
    spec = AttentionSpec(0.25)
    expected = TritonAttention(TARGET).attend(world.query, world.kv, LAYER, world.batch(), spec)
    for row in range(2):
        world.kv.data[world.tables[row, 1], :, :, 5:] = torch.nan
    world.kv.data[0] = torch.nan
    assert torch.equal(TritonAttention(TARGET).attend(world.query, world.kv, LAYER, world.batch(), spec), expected)


def test_splits_are_tiles_at_least_and_follow_from_shapes_alone() -> None:
    assert num_splits(132, 8192, 64, None) == 64
    assert num_splits(2, 4096, 64, None) == 2
    assert num_splits(0, 4096, 64, None) == 1
    assert num_splits(132, 100, 64, None) == 2
    assert num_splits(132, 4096, 64, 128) == 3, "a window needs no more parts than its tiles"
