"""Compiles Triton's kernels for an H100 or H200 where there is none: what an interpreter takes, a compiler may not.

    python -m tests.support.compiling       one line of JSON per kernel: its name and bytes of shared memory

A process of its own, as kernels are defined once, either to be interpreted or to be compiled. Nothing is launched.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels import noise
from kernels.triton import fused, sampling
from kernels.triton.attention import TritonAttention
from kernels.triton.batch_invariant import InvariantLinears
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


def attend(attention: TritonAttention, kv_dtype: torch.dtype, spec: AttentionSpec, num_decode: int, chunk: int) -> None:
    lengths = [1] * num_decode + [chunk] * (chunk > 0)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    tables = torch.zeros(len(lengths), 256, dtype=torch.int64)
    spans = (ChunkSpan(num_decode, num_decode + chunk, 0),) if chunk else ()
    batch = Ragged(starts, torch.zeros_like(starts[1:]), tables, num_decode, 256, spans)
    query = torch.zeros(int(starts[-1]), GROUP * KV_HEADS, DIM, dtype=BF16)
    attention.attend(query, make_kv(kv_dtype), 1, batch, spec)


def main() -> None:
    stay_on_paper()
    plain, bent = AttentionSpec(DIM**-0.5), AttentionSpec(DIM**-0.5, window=1024, soft_cap=50.0)
    attention, invariant = TritonAttention(TARGET), TritonAttention(TARGET, is_batch_invariant=True)
    for kv_dtype in (BF16, FP8):
        attend(attention, kv_dtype, plain, 4, 0)
        attend(attention, kv_dtype, plain, 0, 4096)
    attend(attention, BF16, plain, 256, 0)
    attend(attention, BF16, bent, 4, 64)
    attend(invariant, BF16, plain, 4, 64)
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
