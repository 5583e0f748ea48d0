"""Attention alone: how near decode comes to the memory's rate, and chunks to torch's fastest attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu import flashinfer_peer
from bench.gpu.figures import Entry, Figure, Goal, Missing
from bench.gpu.lab import Lab, Work, relative_error
from bench.gpu.sizes import BLOCK_SIZE, Chunks
from engine.batch import Row, StepBatch
from engine.kv_memory import KvMemory
from engine.step_inputs import flatten
from kernels import dispatch, reference
from kernels.types import AttentionSpec, PagedKv, Ragged
from proto.layout import FP8, KvLayout

_ERROR = Goal(0.01, is_least=False, of_time=False)
_BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


@dataclass(frozen=True, slots=True)
class Paged:
    """Attention over random keys and values of all of ``rows``: (new tokens, cached ones). Blocks lie in no order."""

    query: Tensor
    kv: PagedKv
    batch: Ragged
    tables: tuple[tuple[int, ...], ...]

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(scale=self.query.shape[-1] ** -0.5)

    def dense(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of rows of equal length, ``[rows, kv_heads, tokens, head_dim]`` (whole blocks)."""
        index = torch.tensor(self.tables, device=self.query.device)
        keys, values = (self.kv.data[:, layer, part][index].flatten(1, 2).transpose(1, 2) for part in range(2))
        return keys.contiguous(), values.contiguous()


def measure_decode(lab: Lab) -> Iterator[Entry]:
    sizes = lab.sizes
    rows = [(1, sizes.decode_context - 1)] * sizes.decode_rows
    measured = []
    for dtype, name in (("bfloat16", "bf16 KV"), (FP8, "fp8 KV")):
        case = f"{name}, {sizes.decode_rows} rows of {sizes.decode_context}"
        paged = make_paged(lab, rows, dtype)
        works = _works(lab, paged, has_fp8_kv=dtype == FP8)
        yield _error(lab, f"{case}: error", paged, works[0])
        ours = lab.clock.seconds(works)
        read = sizes.decode_rows * sizes.decode_context * _bytes_per_token(lab, dtype)
        yield Figure(
            case,
            ours * 1e6,
            "µs",
            read / ours / lab.ceilings.bytes_per_s,
            f"copy's {lab.ceilings.bytes_per_s / 1e9:,.0f} GB/s",
            Goal(0.85),
        )
        if dtype != FP8:
            yield _against_torch(lab, f"{case}: torch's time over ours", paged, ours)
        measured.append((case, paged, ours))
    # The last: what it breaks on the device, nothing else here needs.
    for case, paged, ours in measured:
        yield from flashinfer_peer.measure(lab, f"{case}: FlashInfer's time over ours", paged, ours)


def _against_torch(lab: Lab, case: str, paged: Paged, ours: float) -> Entry:
    dense = [paged.dense(layer) for layer in range(lab.sizes.kv_layers)]
    found = _sdpa_times(lab, _BACKENDS, paged.query[:, :, None], dense)
    if not found:
        return Missing(case, "torch has none for this", is_fault=True)
    best, name = min(found)
    return Figure(case, best * 1e6, f"µs ({name})", best / ours, "our time", Goal(1.0))


def measure_chunks(lab: Lab) -> Iterator[Entry]:
    for chunks in lab.sizes.chunks:
        yield from _chunks(lab, chunks)


def _chunks(lab: Lab, chunks: Chunks) -> Iterator[Entry]:
    rows = [(chunks.new, chunks.cached)] * chunks.num_rows
    paged = make_paged(lab, rows, "bfloat16")
    works = _works(lab, paged)
    yield _error(lab, f"{chunks.name}: error", paged, works[0])
    ours = lab.clock.seconds(works)
    pairs = chunks.num_rows * (chunks.new * chunks.cached + chunks.new * (chunks.new + 1) / 2)
    shape = lab.sizes.attention
    rate = 4 * pairs * shape.heads * shape.head_dim / ours
    yield Figure(
        f"{chunks.name}: operations",
        rate / 1e12,
        "TFLOP/s",
        rate / lab.ceilings.flops_per_s,
        f"a large product's {lab.ceilings.flops_per_s / 1e12:,.0f}",
    )
    query = paged.query.view(chunks.num_rows, chunks.new, *paged.query.shape[1:]).transpose(1, 2).contiguous()
    dense = [paged.dense(layer) for layer in range(lab.sizes.kv_layers)]
    length = chunks.new + chunks.cached
    dense = [(keys[:, :, :length].contiguous(), values[:, :, :length].contiguous()) for keys, values in dense]
    found = _sdpa_times(lab, _BACKENDS[:3], query, dense, cached=chunks.cached)
    if not found:
        yield Missing(f"{chunks.name}: against torch", "no fast attention of torch's takes this", is_fault=True)
        return
    best, name = min(found)
    of = f"torch's fastest ({name}): {best * 1e6:,.0f} µs"
    yield Figure(chunks.name, ours * 1e6, "µs", best / ours, of, Goal(0.7))


def make_paged(lab: Lab, rows: list[tuple[int, int]], dtype: str) -> Paged:
    """The same numbers each time."""
    shape = lab.sizes.attention
    generator = torch.Generator(lab.device).manual_seed(7)
    widths = [-(-(new + cached) // BLOCK_SIZE) for new, cached in rows]
    layout = KvLayout(lab.sizes.kv_layers, BLOCK_SIZE, shape.kv_heads, shape.head_dim, dtype, "")
    memory = KvMemory(layout, sum(widths), lab.device)
    for layer in range(layout.num_layers):
        wide = torch.randn(memory.paged.data[:, layer].shape, generator=generator, device=lab.device)
        memory.paged.data[:, layer] = wide.to(memory.paged.data.dtype)
    if memory.paged.scales is not None:
        memory.paged.scales.uniform_(0.5, 2.0, generator=generator)
    order = torch.randperm(sum(widths), generator=torch.Generator().manual_seed(8)).tolist()
    tables, taken = [], 0
    for width in widths:
        tables.append(tuple(order[taken : taken + width]))
        taken += width
    batch = StepBatch(tuple(Row([0] * new, cached, table) for (new, cached), table in zip(rows, tables, strict=True)))
    inputs = flatten(batch, BLOCK_SIZE, lab.device).inputs
    query = torch.randn(
        (sum(new for new, _ in rows), shape.heads, shape.head_dim), generator=generator, device=lab.device
    )
    return Paged(query.to(torch.bfloat16), memory.paged, inputs.batch, tuple(tables))


def _works(lab: Lab, paged: Paged, *, has_fp8_kv: bool = False) -> list[Work]:
    """Our attention, once per layer of the memory."""
    task = dispatch.Task(lab.device, torch.bfloat16, lab.sizes.attention.head_dim, "triton", has_fp8_kv)
    kernels = dispatch.choose(task)

    def of(layer: int) -> Work:
        return lambda: kernels.attend(paged.query, paged.kv, layer, paged.batch, paged.spec)

    return [of(layer) for layer in range(lab.sizes.kv_layers)]


def _error(lab: Lab, case: str, paged: Paged, work: Work) -> Entry:
    """Of the first layer, against torch's own operations in float32."""
    found = work()
    assert isinstance(found, Tensor)
    wide = paged.kv if paged.kv.scales is not None else PagedKv(paged.kv.data[:, :1].float())
    right = reference.attend(paged.query.float(), wide, 0, paged.batch, paged.spec)
    error = relative_error(found, right)
    return Figure(case, error, "", error, "the reference in float32", _ERROR)


def _sdpa_times(
    lab: Lab,
    backends: Sequence[SDPBackend],
    query: Tensor,
    dense: list[tuple[Tensor, Tensor]],
    *,
    cached: int | None = None,
) -> list[tuple[float, str]]:
    """Of each way that torch has for this, with heads that share keys and with keys repeated for them; its name."""
    found = []
    for backend in backends:
        for is_grouped in (True, False):
            seconds = _time_sdpa(lab, backend, query, dense, is_grouped=is_grouped, cached=cached)
            if seconds is not None:
                found.append((seconds, f"{backend.name.lower()}{'' if is_grouped else ', heads repeated'}"))
    return found


def _time_sdpa(
    lab: Lab,
    backend: SDPBackend,
    query: Tensor,
    dense: list[tuple[Tensor, Tensor]],
    *,
    is_grouped: bool,
    cached: int | None,
) -> float | None:
    """None where this backend does not take it. ``cached``: of causal chunks; None: every query sees all."""
    group = query.shape[1] // dense[0][0].shape[1]
    if not is_grouped:
        dense = [(k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)) for k, v in dense]
    mask = causal_lower_right(query.shape[2], dense[0][0].shape[2]) if cached else None

    def of(keys: Tensor, values: Tensor) -> Work:
        def work() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    query, keys, values, attn_mask=mask, is_causal=cached == 0, enable_gqa=is_grouped
                )

        return work

    try:
        return lab.clock.seconds([of(keys, values) for keys, values in dense])
    except RuntimeError:
        lab.finish()
        return None


def _bytes_per_token(lab: Lab, dtype: str) -> int:
    shape = lab.sizes.attention
    return KvLayout(1, BLOCK_SIZE, shape.kv_heads, shape.head_dim, dtype, "").bytes_per_token
