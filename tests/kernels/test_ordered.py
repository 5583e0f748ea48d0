"""The batch-invariant kernels: equal to the reference, and a row's bits are the same whatever it is computed with."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import noise, reference
from kernels.cpu import library, ordered
from kernels.dispatch import Task, choose_batch_invariant
from kernels.types import AttentionSpec, ChunkSpan, HeadNorm, Kernels, KernelsUnavailable, PagedKv, Places, Ragged

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=[0, 1, 2], ids=["avx512", "avx2", "plain"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Compiled for this processor, and as it would be for lesser ones."""
    isas = [("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"), ("avx2", "fma"), ()]
    build = library.Build("ordered", ("ordered.c",), (), isas[request.param])
    if not build.runs_here():
        pytest.skip("this processor cannot run them")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "ordered", lambda: build)
        return ordered.make()


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    share = 1e-5 if dtype == torch.float32 else 2**-7
    assert (found.float() - expected).abs().max() <= share * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(40, 24), (33, 896), (100, 1), (7, 130)])
def test_linear(kernels: Kernels, rows: int, columns: int, dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((67, columns), (rows, columns), (rows,)))
    linear = kernels.linear([weight[: rows // 3], weight[rows // 3 :]], bias)
    found = linear(x)
    close(found, x.float() @ weight.float().T + bias.float(), dtype)
    close(kernels.linear([weight], None)(x), x.float() @ weight.float().T, dtype)
    assert torch.equal(linear.rows(torch.tensor([0, rows - 1, rows // 2])), weight[[0, rows - 1, rows // 2]])
    for first, count in itertools.product((0, 5, 11, 66), (1, 2, 3, 5, 8, 13)):
        assert torch.equal(linear(x[first : first + count]), found[first : first + count])
    torch.set_num_threads(3)
    assert torch.equal(linear(x), found)


def rotate_and_write(
    kernels: Any, x: torch.Tensor, norm: HeadNorm | None, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """``x`` as three query heads, a key and a value: the queries, and what was written, ``[tokens, 5, n]``."""
    slots = torch.arange(len(x))
    kv = PagedKv(torch.zeros(len(x) // 4 + 1, 1, 2, 4, 1, x.shape[2], dtype=x.dtype))
    query = kernels.rotate_and_write(x, norm, Places(cos, sin, slots // 4, slots % 4), kv, 0)
    return torch.cat((query, kv.data[:, 0].transpose(1, 2).flatten(0, 1)[: len(x)].squeeze(2)), 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [16, 20, 64])
def test_elementwise(kernels: Kernels, n: int, dtype: torch.dtype) -> None:
    x = (torch.randn(301, 5, n) * 3).to(dtype)
    per_head, weight, flat = torch.rand(4, n).to(dtype), torch.rand(5 * n).to(dtype), x.flatten(1)[:, : 4 * n]
    cos, sin = torch.randn(2, 301, 1, n)
    cases = {
        "norm": lambda k, x, c, s: k.add_norm(x.flatten(1), None, weight.to(x.dtype), 1e-5)[0],
        "add": lambda k, x, c, s: torch.cat(k.add_norm(x.flatten(1), x.flatten(1), weight.to(x.dtype), 1e-5), 1),
        "rotate": lambda k, x, c, s: rotate_and_write(k, x, None, c, s),
        "norm and rotate": lambda k, x, c, s: rotate_and_write(k, x, HeadNorm(per_head.to(x.dtype), 1e-5), c, s),
        "silu": lambda k, x, c, s: k.gate(x[:, :4].flatten(1), "silu"),
        "gelu": lambda k, x, c, s: k.gate(x[:, :4].flatten(1), "gelu"),
        "tanh": lambda k, x, c, s: k.gate(x[:, :4].flatten(1), "gelu_pytorch_tanh"),
    }
    assert not flat.is_contiguous()
    for name, case in cases.items():
        found = case(kernels, x, cos, sin)
        close(found, case(reference, x.float(), cos, sin), dtype)
        for first, last in ((0, 1), (300, 301), (17, 200)):
            part = case(kernels, x[first:last], cos[first:last], sin[first:last])
            assert torch.equal(part, found[first:last]), name


def test_gate_at_the_ends_of_the_range(kernels: Kernels) -> None:
    left = torch.tensor([[-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, 1.0]])
    found = kernels.gate(torch.cat((left, torch.ones(1, 8)), 1), "silu")
    torch.testing.assert_close(found, torch.nn.functional.silu(left), atol=1e-5, rtol=1e-6)


LENGTHS = [(0, 1), (5, 1), (63, 1), (64, 1), (200, 1), (0, 17), (0, 130), (33, 70), (100, 64)]


def make_batch(lengths: list[tuple[int, int]], tables: torch.Tensor) -> Ragged:
    """``lengths``: (tokens before, tokens in this step) per row, decode rows first."""
    starts = torch.tensor([0] + [tokens for _, tokens in lengths]).cumsum(0)
    num_decode = sum(tokens == 1 for _, tokens in lengths)
    spans = [ChunkSpan(int(starts[row]), int(starts[row + 1]), before) for row, (before, _) in enumerate(lengths)]
    positions = torch.tensor([before for before, _ in lengths])
    return Ragged(starts, positions, tables.contiguous(), num_decode, tables.shape[1], tuple(spans[num_decode:]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 24, 100])
@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "group", "block_size"), [(64, 2, 7, 16), (20, 1, 1, 8), (256, 1, 20, 1), (24, 4, 2, 48)]
)
def test_attend(
    kernels: Kernels,
    head_dim: int,
    kv_heads: int,
    group: int,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
) -> None:
    num_blocks = 256 // block_size + 1
    kv = torch.randn(num_blocks, 3, 2, block_size, kv_heads, head_dim).to(dtype)
    tables = torch.stack([torch.randperm(num_blocks) for _ in LENGTHS])
    batch, heads = make_batch(LENGTHS, tables), kv_heads * group
    query = torch.randn(int(batch.query_starts[-1]), heads + kv_heads, head_dim).to(dtype)[:, :heads]
    found = kernels.attend(query, PagedKv(kv), 1, batch, AttentionSpec(0.2, window))
    close(found, reference.attend(query.float(), PagedKv(kv.float()), 1, batch, AttentionSpec(0.2, window)), dtype)
    for row, (before, tokens) in enumerate(LENGTHS):
        for first, count in {(0, 1), (tokens // 2, 1), (tokens - 1, 1), (tokens // 3, tokens - tokens // 3)}:
            alone = make_batch([(before + first, count)], tables[row : row + 1])
            place = int(batch.query_starts[row]) + first
            again = kernels.attend(query[place : place + count], PagedKv(kv), 1, alone, AttentionSpec(0.2, window))
            assert torch.equal(again, found[place : place + count]), "a token's result depends on its batch or chunk"
    torch.set_num_threads(3)
    assert torch.equal(kernels.attend(query, PagedKv(kv), 1, batch, AttentionSpec(0.2, window)), found)


@pytest.mark.parametrize("is_fp8", [False, True])
def test_attend_with_soft_caps_and_fp8(kernels: Kernels, is_fp8: bool) -> None:
    kv = PagedKv(torch.randn(15, 2, 2, 16, 2, 20))
    if is_fp8:
        data, scales = reference.quantise_kv(kv.data)
        kv = PagedKv(data, scales.transpose(3, 4).contiguous())
    batch = make_batch([(5, 1), (63, 1), (0, 70)], torch.randperm(15).view(3, 5))
    query, spec = torch.randn(72, 6, 20), AttentionSpec(1.0, 40, soft_cap=2.0)
    found = kernels.attend(query, kv, 1, batch, spec)
    close(found, reference.attend(query, kv, 1, batch, spec), torch.float32)


def test_attend_reads_nothing_beyond_the_sequence(kernels: Kernels) -> None:
    kv = torch.randn(8, 1, 2, 16, 2, 64)
    batch = make_batch([(4, 1), (0, 37)], torch.tensor([[0, 0, 0], [1, 2, 3]]))
    query = torch.randn(38, 4, 64)
    expected = kernels.attend(query, PagedKv(kv), 0, batch, AttentionSpec(0.125))
    kv[0, :, :, 5:] = torch.nan
    kv[3, :, :, 5:] = torch.nan
    kv[4:] = torch.nan
    assert torch.equal(kernels.attend(query, PagedKv(kv), 0, batch, AttentionSpec(0.125)), expected)


def test_noise_of_a_row_is_its_own(kernels: Kernels) -> None:
    keys = [noise.draw_key(seed, seed * 7) for seed in range(20)]
    found = ordered.gumbel(keys, 1003, CPU)
    torch.testing.assert_close(found, noise.gumbel(keys, 1003, CPU), rtol=1e-6, atol=1e-6)
    for row in (0, 7, 19):
        assert torch.equal(found[row], ordered.gumbel(keys[row : row + 1], 1003, CPU)[0])


def test_fused_instructions_of_any_width_give_the_same_bits() -> None:
    builds = [library.Build("ordered", ("ordered.c",), (), isa) for isa in (("avx512f", "fma"), ("avx2", "fma"))]
    if not all(build.runs_here() for build in builds):
        pytest.skip("this processor has one width only")
    x, weight = torch.randn(50, 300), torch.randn(70, 300)
    wide, narrow = (ordered.OrderedKernels(library.load(build)).linear([weight], None)(x) for build in builds)
    assert torch.equal(wide, narrow)


def test_what_cannot_be_invariant_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for dtype, head_dim, reason in (
        (torch.float16, 64, "float16"),
        (torch.float32, 288, "288"),
    ):
        with pytest.raises(KernelsUnavailable, match=reason):
            choose_batch_invariant(Task(CPU, dtype, head_dim))
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "/bin/false")
    with pytest.raises(KernelsUnavailable, match="not usable"):
        choose_batch_invariant(Task(CPU, torch.float32, 64))


def test_without_tiles_bfloat16_is_computed_in_order_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "AMX", library.Build("kernels", (), (), ("a feature no processor has",)))
    with caplog.at_level(logging.INFO):
        chosen = choose_batch_invariant(Task(CPU, torch.bfloat16, 64))
    assert (chosen.name, chosen.is_batch_invariant) == ("ordered", True)
    assert "none for this processor" in caplog.text
