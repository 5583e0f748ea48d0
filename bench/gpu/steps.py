"""Whole steps of one engine: how near they come to what the memory and the matrix units allow."""

from __future__ import annotations

from collections.abc import Iterator

from bench.gpu.engines import Engine, opened, settings
from bench.gpu.figures import Entry, Figure, Goal
from bench.gpu.lab import Lab

_BYTES = 2
_PREFILLS = 5
_FLOOR = Goal(1.25, is_least=False)
_FP8 = Goal(0.65, is_least=False)


def measure(lab: Lab) -> Iterator[Entry]:
    sizes = lab.sizes
    with opened(settings(lab)) as engine:
        for num_rows in sizes.steps:
            yield _decode(lab, engine, num_rows)
        yield _prefill(lab, engine)


def measure_fp8(lab: Lab) -> Iterator[Entry]:
    """Weights rounded at load, activations at every product."""
    sizes = lab.sizes
    times = {}
    for quantization in (None, "fp8"):
        with opened(settings(lab, quantization=quantization)) as engine:
            times[quantization] = engine.decode_step_s(sizes.quantised_batch, sizes.context, sizes.num_steps)
    plain, rounded = times[None], times["fp8"]
    case = f"a decode step of {sizes.quantised_batch}"
    yield Figure(
        case, rounded * 1e3, "ms", rounded / plain, f"{plain * 1e3:.4g} ms in bf16", Goal(0.65, is_least=False)
    )


def _decode(lab: Lab, engine: Engine, num_rows: int) -> Entry:
    """A step reads all weights but the embeddings once, and every row's keys and values."""
    sizes = lab.sizes
    weights = _BYTES * (sizes.model.num_matrix_weights + sizes.vocab_size * sizes.model.hidden)
    tokens = num_rows * (sizes.context + sizes.num_steps / 2)
    num_bytes = weights + tokens * engine.parts.facts.layout.bytes_per_token
    floor = num_bytes / lab.ceilings.bytes_per_s
    seconds = engine.decode_step_s(num_rows, sizes.context, sizes.num_steps)
    of = f"{floor * 1e3:.4g} ms: its bytes at copy's rate"
    return Figure(f"decoding {num_rows}, {sizes.context} tokens each", seconds * 1e3, "ms", seconds / floor, of, _FLOOR)


def _prefill(lab: Lab, engine: Engine) -> Entry:
    """Products of all tokens, attention of half of all pairs. Of the last layer only one token goes on."""
    sizes, shape = lab.sizes, lab.sizes.model
    pairs = sizes.prompt * (sizes.prompt + 1) / 2
    spared = (sizes.prompt - 1) * shape.hidden * (shape.heads * shape.head_dim + 3 * shape.inner)
    flops = (
        2 * (sizes.prompt * shape.num_matrix_weights - spared) + 4 * pairs * shape.layers * shape.heads * shape.head_dim
    )
    seconds = engine.prefill_s(sizes.prompt, _PREFILLS)
    rate = flops / seconds
    of = f"a large product's {lab.ceilings.flops_per_s / 1e12:,.0f} TFLOP/s"
    case = f"a prompt of {sizes.prompt}: {seconds * 1e3:,.1f} ms"
    return Figure(case, rate / 1e12, "TFLOP/s", rate / lab.ceilings.flops_per_s, of, Goal(0.6))
