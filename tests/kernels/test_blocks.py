"""Moving and summing blocks: both twins against plain Python, and against the checksum that they serve."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.reference import blocks as reference
from kvtransfer.integrity import BlockChecksum, finalise, key_words
from tests.support.handoff import block_hash

if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
    from kernels.triton import blocks as compiled

    TWINS = (reference, compiled)
else:
    TWINS = (reference,)

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Sum = Callable[[Tensor, Tensor, Tensor], Tensor]
Copy = Callable[[Tensor, Tensor, Tensor, Tensor], None]
each_sum = pytest.mark.parametrize("sum_blocks", [twin.sum_blocks for twin in TWINS], ids=lambda f: f.__module__)
each_copy = pytest.mark.parametrize("copy_blocks", [twin.copy_blocks for twin in TWINS], ids=lambda f: f.__module__)


def memory(num_rows: int, block_bytes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num_rows, block_bytes), generator=generator, dtype=torch.uint8).to(DEVICE)


def key_of(block_bytes: int) -> Tensor:
    return torch.from_numpy(key_words(-(-block_bytes // 8) * 2).view(np.int64).copy()).to(DEVICE)


def rows_of(*rows: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=DEVICE)


@each_sum
@settings(max_examples=12, deadline=None)
@given(
    num_words=st.integers(1, 5000),
    rows=st.lists(st.integers(0, 9), min_size=1, max_size=19),
    seed=st.integers(0, 99),
)
def test_a_total_gives_the_checksum_of_the_cpu(sum_blocks: Sum, num_words: int, rows: list[int], seed: int) -> None:
    """Bit for bit, whatever the number of blocks and tiles, and in whatever order they are asked for."""
    num_bytes = num_words * 8
    blocks = memory(10, num_bytes, seed)
    totals = sum_blocks(blocks, rows_of(*rows), key_of(num_bytes)).tolist()
    checksum = BlockChecksum(num_bytes)
    for row, total in zip(rows, totals, strict=True):
        data = blocks[row].cpu().numpy().tobytes()
        assert finalise(total, block_hash(row), num_bytes) == checksum.of(data, block_hash(row))


@pytest.mark.parametrize("num_bytes", [1, 7, 12, 8195])
def test_blocks_that_are_no_whole_number_of_words(num_bytes: int) -> None:
    blocks = memory(3, num_bytes)
    (total,) = reference.sum_blocks(blocks, rows_of(1), key_of(num_bytes)).tolist()
    data = blocks[1].cpu().numpy().tobytes()
    assert finalise(total, block_hash(0), num_bytes) == BlockChecksum(num_bytes).of(data, block_hash(0))


@each_sum
@pytest.mark.parametrize("seed", range(4))
def test_totals_of_rows_that_lie_apart(sum_blocks: Sum, seed: int) -> None:
    """As the blocks of a memory with something behind each of them."""
    dice = random.Random(seed)
    num_rows, num_words, gap = dice.randrange(1, 12), dice.randrange(1, 4500), dice.randrange(1, 70)
    wide = memory(num_rows, 8 * (gap + num_words), seed)
    blocks = wide[:, 8 * dice.randrange(gap + 1) :][:, : 8 * num_words]
    rows = [dice.randrange(num_rows) for _ in range(dice.randrange(1, 20))]
    totals = sum_blocks(blocks, rows_of(*rows), key_of(8 * num_words)).tolist()
    whole = reference.sum_blocks(blocks.contiguous(), rows_of(*rows), key_of(8 * num_words)).tolist()
    assert totals == whole
    data = blocks[rows[0]].cpu().numpy().tobytes()
    assert finalise(totals[0], block_hash(0), 8 * num_words) == BlockChecksum(8 * num_words).of(data, block_hash(0))


@each_sum
def test_the_largest_words_wrap_as_they_should(sum_blocks: Sum) -> None:
    num_bytes = 8 * 4097
    blocks = torch.full((1, num_bytes), 255, dtype=torch.uint8, device=DEVICE)
    (total,) = sum_blocks(blocks, rows_of(0), key_of(num_bytes)).tolist()
    data = b"\xff" * num_bytes
    assert finalise(total, block_hash(0), num_bytes) == BlockChecksum(num_bytes).of(data, block_hash(0))


@each_sum
def test_no_blocks_have_no_totals(sum_blocks: Sum) -> None:
    assert sum_blocks(memory(2, 64), rows_of(), key_of(64)).tolist() == []


@each_copy
@settings(max_examples=12, deadline=None)
@given(num_words=st.integers(1, 5000), pairs=st.dictionaries(st.integers(0, 9), st.integers(0, 7), max_size=10))
def test_rows_arrive_where_they_should_and_nowhere_else(
    copy_blocks: Copy, num_words: int, pairs: dict[int, int]
) -> None:
    source, target = memory(8, num_words * 8, 1), memory(10, num_words * 8, 2)
    expected = target.clone()
    for to, at in pairs.items():
        expected[to] = source[at]
    before = source.clone()
    copy_blocks(source, rows_of(*pairs.values()), target, rows_of(*pairs.keys()))
    assert torch.equal(target, expected)
    assert torch.equal(source, before)


@each_copy
def test_memory_may_have_gaps_between_its_rows(copy_blocks: Copy) -> None:
    """As a ring or a mapping may, where something lies behind each block."""
    source, target = memory(4, 96, 3)[:, :64], memory(3, 72, 4)
    behind = target[:, 64:].clone()
    copy_blocks(source, rows_of(3, 0), target[:, :64], rows_of(1, 2))
    assert torch.equal(target[1, :64], source[3])
    assert torch.equal(target[2, :64], source[0])
    assert torch.equal(target[:, 64:], behind)


def test_words_are_for_blocks_of_whole_ones() -> None:
    if len(TWINS) == 2:
        assert [compiled.takes(size) for size in (8, 4096, 12, 4)] == [True, True, False, False]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.triton import block_kernels as programs

WORDS = ("source", "target", "source_rows", "target_rows", "blocks", "rows", "key", "partials")
for program, sizes in ((programs.copy, {"TILE": 2048}), (programs.sum_tiles, {"TILE": 2048, "ROWS": 8})):
    kinds = {name: "*i64" if name in WORDS else "i32" for name in program.arg_names}
    signature = kinds | dict.fromkeys(sizes, "constexpr")
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(program.arg_names) if name not in sizes}
    source = ASTSource(fn=program, signature=signature, constexprs=sizes, attrs=divisible)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    print("ld.global.v2.b64" in ptx)
"""


@pytest.mark.skipif(len(TWINS) == 1, reason="there is no Triton here")
def test_programs_compile_for_a_gpu_and_read_16_bytes_at_a_time(tmp_path: Path) -> None:
    """No GPU is needed to compile for one; the interpreter takes more than the compiler does."""
    environ = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environ, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["True", "True"], "")
