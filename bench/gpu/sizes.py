"""How large everything is that is measured: for a GPU, or for a look at whether all of it runs."""

from __future__ import annotations

from dataclasses import dataclass

from bench.settings import SHAPES, Shape

BLOCK_SIZE = 16
"""Tokens to a block of KV, in all that is measured."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """Rows of ``new`` tokens behind ``cached`` ones each, all in one step."""

    name: str
    num_rows: int
    new: int
    cached: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """What the whole stack is asked, at each of ``rates`` (requests per second), and what counts as good (ms)."""

    rates: tuple[float, ...]
    num_prompts: int
    input_len: int
    output_len: int
    max_ttft_ms: float
    max_tpot_ms: float


@dataclass(frozen=True, slots=True)
class Sizes:
    """``kv_layers``: how many attention's KV memory has; repeats go from one to the next, so that no cache helps.

    ``steps``: batch sizes of measured decode steps, of ``context`` tokens each, ``num_steps`` of them. ``among``: how
    many others a row shares its batch with where its bits are compared.
    """

    name: str
    copy_bytes: int
    matrix: int
    repeats: int
    attention: Shape
    kv_layers: int
    decode_rows: int
    decode_context: int
    chunks: tuple[Chunks, ...]
    model: Shape
    vocab_size: int
    steps: tuple[int, ...]
    context: int
    num_steps: int
    prompt: int
    batch_tokens: int
    batch_prompt: int
    batch_output: int
    batch_size: int
    quantised_batch: int
    among: int
    compared: int
    handoff_tokens: int
    load: Load


FULL = Sizes(
    name="full",
    copy_bytes=4 << 30,
    matrix=8192,
    repeats=20,
    attention=SHAPES["8b"],
    kv_layers=4,
    decode_rows=64,
    decode_context=4096,
    chunks=(
        Chunks("8k tokens", 1, 8192),
        Chunks("four prompts of 2k", 4, 2048),
        Chunks("512 on 8k cached", 1, 512, 8192),
    ),
    model=SHAPES["8b"],
    vocab_size=128256,
    steps=(1, 16, 64, 256),
    context=1024,
    num_steps=48,
    prompt=8192,
    batch_tokens=8192,
    batch_prompt=512,
    batch_output=128,
    batch_size=64,
    quantised_batch=16,
    among=63,
    compared=48,
    handoff_tokens=8192,
    load=Load((2.0, 6.0), 48, 2048, 128, max_ttft_ms=1000.0, max_tpot_ms=40.0),
)

_TOY_SHAPE = Shape(hidden=64, inner=96, layers=2, heads=4, kv_heads=2, head_dim=32, ties_embeddings=False)

TOY = Sizes(
    name="toy",
    copy_bytes=1 << 20,
    matrix=128,
    repeats=2,
    attention=_TOY_SHAPE,
    kv_layers=2,
    decode_rows=3,
    decode_context=48,
    chunks=(Chunks("40 tokens", 1, 40), Chunks("two prompts of 24", 2, 24), Chunks("8 on 40 cached", 1, 8, 40)),
    model=_TOY_SHAPE,
    vocab_size=400,
    steps=(1, 3),
    context=24,
    num_steps=4,
    prompt=64,
    batch_tokens=64,
    batch_prompt=12,
    batch_output=4,
    batch_size=3,
    quantised_batch=2,
    among=3,
    compared=6,
    handoff_tokens=256,
    load=Load((2.0, 4.0), 4, 24, 6, max_ttft_ms=10_000.0, max_tpot_ms=5_000.0),
)
