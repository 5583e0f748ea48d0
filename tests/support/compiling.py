"""Compiles Triton's kernels for an H100 or H200 where there is none: what an interpreter takes, a compiler may not.

    python -m tests.support.compiling       one line of JSON per kernel: its name, the compute capability (90 for an
                                            H100 or H200, 80 for an A100), bytes of shared memory

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
from kernels.quantised import CodedMatrix, Matrix, ScaledMatrix
from kernels.reference import linear
from kernels.triton import blocks, fused, sampling
from kernels.triton.attention import TritonAttention
from kernels.triton.batch_invariant import InvariantLinears
from kernels.triton.quantised import TritonQuantised
from kernels.triton.runtime import Target
from kernels.types import AttentionSpec, ChunkSpan, DrawRules, HeadNorm, PagedKv, Places, Ragged

TARGET = Target(num_sms=132, is_interpreted=False)
OLDEST = Target(num_sms=108, is_interpreted=False, has_fp8=False)
BLOCK, KV_HEADS, GROUP, DIM = 16, 8, 4, 128
SIZE = 1024
"""Rows and columns of a quantised matrix."""
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def stay_on_paper(capability: int) -> None:
    """From now on a launch compiles its kernel for ``capability``, says so, and does nothing else."""
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: capability,  # a kernel is compiled once for a device
            get_current_stream=lambda device: 0,
            get_active_torch_device=lambda: torch.device("cpu"),
        )
    )

    def compile_only(function: Any, grid: object) -> Callable[..., None]:
        def launch(*args: object, **options: object) -> None:
            compiled = function.run(*args, grid=grid, warmup=True, **options)
            sys.stdout.write(json.dumps([function.fn.__name__, capability, compiled.metadata.shared]) + "\n")

        return launch

    JITFunction.__getitem__ = compile_only


def make_kv(dtype: torch.dtype, dim: int = DIM, num_blocks: int = 512) -> PagedKv:
    data = torch.zeros(num_blocks, 2, 2, BLOCK, KV_HEADS, dim, dtype=torch.uint8 if dtype == FP8 else dtype)
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
    dim: int = DIM,
) -> None:
    lengths = [1] * num_decode + [chunk] * (chunk > 0)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    tables = torch.zeros(len(lengths), 256, dtype=torch.int64)
    spans = (ChunkSpan(num_decode, num_decode + chunk, 0),) if chunk else ()
    batch = Ragged(starts, torch.zeros_like(starts[1:]), tables, num_decode, 256, spans)
    query = torch.zeros(int(starts[-1]), GROUP * KV_HEADS, dim, dtype=dtype)
    attention.attend(query, make_kv(kv_dtype, dim), 1, batch, spec)


def scaled(dtype: torch.dtype, *, quantises_inputs: bool) -> ScaledMatrix:
    """A scale per row."""
    values = torch.zeros(SIZE, SIZE, dtype=torch.uint8).view(dtype)
    return ScaledMatrix(values, torch.ones(SIZE, 1), 1, SIZE, quantises_inputs)


def coded(bits: int, group: int, *, has_zero: bool = False, table: torch.Tensor | None = None) -> CodedMatrix:
    codes = torch.zeros(SIZE, SIZE * bits // 8, dtype=torch.uint8)
    scale = torch.ones(SIZE // group, SIZE, dtype=BF16)
    return CodedMatrix(codes, bits, SIZE, scale, group, torch.zeros_like(scale).byte() if has_zero else None, table)


def multiply(products: TritonQuantised, matrix: Matrix, *num_tokens: int) -> None:
    product = products.linear([matrix], None)
    for tokens in num_tokens:
        product(torch.zeros(tokens, SIZE, dtype=BF16))


def multiply_quantised() -> None:
    """Few tokens and many, by each kind of weights."""
    products, invariant = TritonQuantised(TARGET, BF16, linear), TritonQuantised(TARGET, BF16, linear, True)
    fp8 = scaled(FP8, quantises_inputs=True)
    per_block = replace(fp8, scale=torch.ones(SIZE // 128, SIZE // 128), rows_per_scale=128, columns_per_scale=128)
    for matrix in (fp8, scaled(FP8, quantises_inputs=False), per_block, coded(4, 128)):
        multiply(products, matrix, 16, 512)
    for quantises_inputs in (True, False):
        multiply(products, scaled(torch.int8, quantises_inputs=quantises_inputs), 16, 512)
    multiply(products, coded(4, 128, has_zero=True), 16, 512)  # AWQ
    multiply(products, coded(4, 64, table=torch.zeros(16)), 16, 512)  # nf4
    multiply(products, coded(8, 128), 16, 512)
    for matrix in (fp8, coded(4, 128)):
        multiply(invariant, matrix, 16)


def run_on_the_oldest() -> None:
    """Without a unit for fp8: its weights are widened by hand, and keys are never stored so."""
    multiply(TritonQuantised(OLDEST, BF16, linear), scaled(FP8, quantises_inputs=True), 16, 512)
    attend(TritonAttention(OLDEST), BF16, AttentionSpec(DIM**-0.5), 4, 64)


def move_blocks() -> None:
    memory, index = torch.zeros(8, 1 << 16, dtype=torch.uint8), torch.arange(8)
    blocks.copy_blocks(memory, index, memory, index)
    blocks.sum_blocks(memory, index, torch.zeros(1 << 14, dtype=torch.int64))


def main() -> None:
    stay_on_paper(90)
    plain, bent = AttentionSpec(DIM**-0.5), AttentionSpec(DIM**-0.5, window=1024, soft_cap=50.0)
    attention, invariant = TritonAttention(TARGET), TritonAttention(TARGET, is_batch_invariant=True)
    for kv_dtype in (BF16, FP8):
        attend(attention, kv_dtype, plain, 4, 0)
        attend(attention, kv_dtype, plain, 0, 4096)
    attend(attention, BF16, plain, 256, 0)
    attend(attention, BF16, bent, 4, 64)
    attend(attention, torch.float32, plain, 4, 64, dtype=torch.float32)
    for kv_dtype in (BF16, FP8):
        attend(invariant, kv_dtype, plain, 4, 64)
        attend(attention, kv_dtype, AttentionSpec(256**-0.5), 4, 64, dim=256)
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
    stay_on_paper(80)
    run_on_the_oldest()


if __name__ == "__main__":
    main()
