"""Compiles Triton's kernels for an H100 or H200 where there is none: what an interpreter takes, a compiler may not.

    python -m tests.support.compiling       one line of JSON per kernel: its name and bytes of shared memory

A process of its own, as kernels are defined once, either to be interpreted or to be compiled. Nothing is launched.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels import noise
from kernels.quantised import CodedMatrix, ScaledMatrix
from kernels.reference import linear
from kernels.triton import blocks, fused, sampling
from kernels.triton.attention import TritonAttention
from kernels.triton.batch_invariant import InvariantLinears
from kernels.triton.quantised import TritonQuantised
from kernels.triton.runtime import Target
from kernels.types import AttentionSpec, ChunkSpan, DrawRules, HeadNorm, PagedKv, Places, Ragged

TARGET = Target(num_sms=132, is_interpreted=False)
BLOCK, KV_HEADS, GROUP, DIM = 16, 8, 4, 128
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def stay_on_paper() -> None:
    """From now on a launch compiles its kernel for compute capability 9.0, says so, and does nothing else."""
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_active_torch_device=lambda: torch.device("cpu"),
        )
    )

    def compile_only(function: Any, grid: object) -> Callable[..., None]:
        def launch(*args: object, **options: object) -> None:
            compiled = function.run(*args, grid=grid, warmup=True, **options)
            sys.stdout.write(json.dumps([function.fn.__name__, compiled.metadata.shared]) + "\n")

        return launch

    JITFunction.__getitem__ = compile_only


def make_kv(dtype: torch.dtype, num_blocks: int = 512) -> PagedKv:
    data = torch.zeros(num_blocks, 2, 2, BLOCK, KV_HEADS, DIM, dtype=torch.uint8 if dtype == FP8 else dtype)
    if dtype != FP8:
        return PagedKv(data)
    return PagedKv(data.view(FP8), torch.zeros(num_blocks, 2, 2, KV_HEADS, BLOCK))


def attend(
    attention: TritonAttention,
    kv_dtype: torch.dtype,
    spec: AttentionSpec,
    num_decode: int,
    chunk: int,
    dtype: torch.dtype = BF16,
) -> None:
    lengths = [1] * num_decode + [chunk] * (chunk > 0)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    tables = torch.zeros(len(lengths), 256, dtype=torch.int64)
    spans = (ChunkSpan(num_decode, num_decode + chunk, 0),) if chunk else ()
    batch = Ragged(starts, torch.zeros_like(starts[1:]), tables, num_decode, 256, spans)
    query = torch.zeros(int(starts[-1]), GROUP * KV_HEADS, DIM, dtype=dtype)
    attention.attend(query, make_kv(kv_dtype), 1, batch, spec)


def multiply_quantised() -> None:
    """Few tokens and many, by weights of 8 bits (a scale per row, or blocks) and of 4."""
    products = TritonQuantised(TARGET, BF16, linear)
    size = 1024
    values = torch.zeros(size, size, dtype=torch.uint8).view(FP8)
    rows = ScaledMatrix(values, torch.ones(size, 1), 1, size, quantises_inputs=True)
    parts = ScaledMatrix(values, torch.ones(size // 128, size // 128), 128, 128, quantises_inputs=True)
    codes = CodedMatrix(torch.zeros(size, size // 2, dtype=torch.uint8), 4, size, torch.ones(size // 128, size), 128)
    for matrix in (rows, replace(rows, quantises_inputs=False), parts, codes):
        product = products.linear([matrix], None)
        for tokens in (16, 512):
            product(torch.zeros(tokens, size, dtype=BF16))


def move_blocks() -> None:
    memory, index = torch.zeros(8, 1 << 16, dtype=torch.uint8), torch.arange(8)
    blocks.copy_blocks(memory, index, memory, index)
    blocks.sum_blocks(memory, index, torch.zeros(1 << 14, dtype=torch.int64))


def main() -> None:
    stay_on_paper()
    plain, bent = AttentionSpec(DIM**-0.5), AttentionSpec(DIM**-0.5, window=1024, soft_cap=50.0)
    attention, invariant = TritonAttention(TARGET), TritonAttention(TARGET, is_batch_invariant=True)
    for kv_dtype in (BF16, FP8):
        attend(attention, kv_dtype, plain, 4, 0)
        attend(attention, kv_dtype, plain, 0, 4096)
    attend(attention, BF16, plain, 256, 0)
    attend(attention, BF16, bent, 4, 64)
    attend(attention, torch.float32, plain, 4, 64, dtype=torch.float32)
    attend(invariant, BF16, plain, 4, 64)
    multiply_quantised()
    move_blocks()
    x = torch.zeros(64, 4096, dtype=BF16)
    InvariantLinears(TARGET).linear([torch.zeros(512, 4096, dtype=BF16)], torch.zeros(512, dtype=BF16))(x)
    fused.add_norm(x, x, x[0], 1e-5)
    fused.gate(x, "silu")
    heads = (GROUP + 2) * KV_HEADS
    angles, index = torch.zeros(64, 1, DIM), torch.zeros(64, dtype=torch.int64)
    norm = HeadNorm(torch.zeros(heads - KV_HEADS, DIM, dtype=BF16), 1e-5)
    places = Places(angles, angles, index, index)
    for kv_dtype in (BF16, FP8):
        fused.rotate_and_write(torch.zeros(64, heads, DIM, dtype=BF16), norm, places, make_kv(kv_dtype), 1)
    sampling.draw(
        torch.zeros(2, 32_000), DrawRules([1.0] * 2, [0.1] * 2, [50] * 2, [0.9] * 2, [noise.draw_key(1, 2)] * 2)
    )


if __name__ == "__main__":
    main()
