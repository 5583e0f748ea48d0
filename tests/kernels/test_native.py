"""The compiled kernels against the reference in float32, and what only they promise: rows that ignore their batch.

Skipped where they cannot run (no AMX, no compiler).
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from kernels import noise, reference
from kernels.cpu import library, native
from kernels.dispatch import REFERENCE
from kernels.types import AttentionSpec, ChunkSpan, PagedKv, Places, Ragged

BFLOAT = torch.bfloat16


@pytest.fixture(scope="module")
def kernels() -> native.NativeKernels:
    loaded = native.load(REFERENCE)
    if loaded is None:
        pytest.skip("the compiled kernels cannot run here")
    return loaded


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to bfloat16's rounding of results as large as these."""
    assert found.dtype == BFLOAT
    assert (found.float() - expected).abs().max() <= 2**-7 * expected.abs().max()


@pytest.mark.parametrize(
    ("tokens", "rows", "columns"),
    [(1, 40, 64), (5, 32, 32), (17, 320, 96), (33, 100, 4864), (130, 64, 1088), (700, 96, 2048), (513, 33, 1056)],
)
def test_linear(kernels: native.NativeKernels, tokens: int, rows: int, columns: int) -> None:
    x, weight, bias = (torch.randn(shape).to(BFLOAT) for shape in ((tokens, columns), (rows, columns), (rows,)))
    linear, plain = kernels.linear([weight], bias), kernels.linear([weight], None)
    product = x.float() @ weight.float().T
    close(linear(x), product + bias.float())
    close(plain(x), product)
    index = torch.tensor([0, rows - 1, rows // 2])
    assert torch.equal(plain.rows(index), weight[index])
    for first, last in ((0, 1), (tokens - 1, tokens), (tokens // 3, tokens // 3 + 20)):
        assert torch.equal(linear(x[first:last]), linear(x)[first:last])


@pytest.mark.parametrize("heights", [(16, 32, 16), (5, 1, 40), (33,), (48, 7)])
def test_linear_of_parts_is_that_of_the_whole(kernels: native.NativeKernels, heights: tuple[int, ...]) -> None:
    parts = [torch.randn(height, 96).to(BFLOAT) for height in heights]
    x, index = torch.randn(20, 96).to(BFLOAT), torch.arange(sum(heights))
    linear = kernels.linear(parts, None)
    assert torch.equal(linear(x), kernels.linear([torch.cat(parts)], None)(x))
    assert torch.equal(linear.rows(index), torch.cat(parts))


def make_batch(lengths: list[tuple[int, int]], width: int, num_blocks: int) -> Ragged:
    """``lengths``: (tokens before, tokens in this step) per row, decode rows first."""
    starts = torch.tensor([0] + [tokens for _, tokens in lengths]).cumsum(0)
    num_decode = sum(tokens == 1 for _, tokens in lengths)
    spans = [ChunkSpan(int(starts[row]), int(starts[row + 1]), before) for row, (before, _) in enumerate(lengths)]
    return Ragged(
        query_starts=starts,
        positions=torch.tensor([before for before, _ in lengths]),
        block_table=torch.stack([torch.randperm(num_blocks)[:width] for _ in lengths]),
        num_decode=num_decode,
        decode_width=width,
        chunks=tuple(spans[num_decode:]),
    )


LENGTHS = [(0, 1), (5, 1), (63, 1), (64, 1), (200, 1), (0, 17), (0, 130), (33, 70), (100, 64)]


@pytest.mark.parametrize("window", [None, 24, 100])
@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "group", "block_size"),
    [(64, 2, 7, 16), (128, 8, 4, 16), (32, 1, 1, 32), (96, 4, 1, 48), (256, 1, 20, 16)],
)
def test_attend(
    kernels: native.NativeKernels, head_dim: int, kv_heads: int, group: int, block_size: int, window: int | None
) -> None:
    num_blocks = 64
    kv = torch.randn(num_blocks, 3, 2, block_size, kv_heads, head_dim).to(BFLOAT)
    batch = make_batch(LENGTHS, 20, num_blocks)
    heads = kv_heads * group
    query = torch.randn(int(batch.query_starts[-1]), heads + kv_heads, head_dim).to(BFLOAT)[:, :heads]
    found = kernels.attend(query, PagedKv(kv), 1, batch, AttentionSpec(head_dim**-0.5, window))
    close(found, reference.attend(query.float(), PagedKv(kv.float()), 1, batch, AttentionSpec(head_dim**-0.5, window)))
    for row, (before, tokens) in enumerate(LENGTHS):
        token = tokens // 2
        alone = Ragged(
            query_starts=torch.tensor([0, 1]),
            positions=torch.tensor([before + token]),
            block_table=batch.block_table[row : row + 1].contiguous(),
            num_decode=1,
            decode_width=20,
            chunks=(),
        )
        place = int(batch.query_starts[row]) + token
        again = kernels.attend(query[place : place + 1], PagedKv(kv), 1, alone, AttentionSpec(head_dim**-0.5, window))
        assert torch.equal(again[0], found[place]), "a token's result depends on its batch or chunk"


def test_attend_reads_no_value_beyond_the_sequence(kernels: native.NativeKernels) -> None:
    kv = torch.randn(8, 1, 2, 16, 2, 64).to(BFLOAT)
    batch = make_batch([(4, 1), (0, 37)], 3, 8)
    batch.block_table[:] = torch.tensor([[0, 0, 0], [1, 2, 3]])
    query = torch.randn(38, 4, 64).to(BFLOAT)
    expected = kernels.attend(query, PagedKv(kv), 0, batch, AttentionSpec(0.125))
    kv[0, :, :, 5:] = torch.nan
    kv[3, :, :, 5:] = torch.nan
    kv[4:] = torch.nan
    assert torch.equal(kernels.attend(query, PagedKv(kv), 0, batch, AttentionSpec(0.125)), expected)


@pytest.mark.parametrize("tokens", [1, 3, 300])
def test_elementwise(kernels: native.NativeKernels, tokens: int) -> None:
    x = (torch.randn(tokens, 10, 64) * 3).to(BFLOAT)
    per_head, weight = torch.rand(6, 64).to(BFLOAT), torch.rand(640).to(BFLOAT)
    close(kernels.rms_norm(x[:, :6], per_head, 1e-5), reference.rms_norm(x[:, :6].float(), per_head.float(), 1e-5))
    flat = x.flatten(1)
    close(kernels.rms_norm(flat, weight, 1e-5), reference.rms_norm(flat.float(), weight.float(), 1e-5))
    cos, sin = torch.randn(2, tokens, 1, 64)
    close(kernels.rotate(x[:, :6], cos, sin), reference.rotate(x[:, :6].float(), cos, sin))
    residual = torch.randn(tokens, 640).to(BFLOAT)
    normed, total = kernels.add_norm(flat, residual, weight, 1e-5)
    assert torch.equal(total, flat + residual)
    assert torch.equal(normed, kernels.rms_norm(total, weight, 1e-5))
    close(kernels.gate(flat, "silu"), reference.gate(flat.float(), "silu"))


def test_gumbel_is_that_of_the_definition(kernels: native.NativeKernels) -> None:
    keys = [noise.draw_key(seed, seed * 7) for seed in range(40)]
    for vocab_size in (1, 16, 1003, 30_000):
        expected = noise.gumbel(keys, vocab_size, torch.device("cpu"))
        found = kernels.gumbel(keys, vocab_size, torch.device("cpu"))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(found[3], kernels.gumbel(keys[3:4], vocab_size, torch.device("cpu"))[0])


def test_gate_at_the_ends_of_the_range(kernels: native.NativeKernels) -> None:
    left = torch.tensor([-1e30, -200.0, -88.0, -1.0, 0.0, 1.0, 88.0, 200.0, 1e30] + [0.0] * 7)
    x = torch.cat((left, torch.ones(16)))[None].to(BFLOAT)
    close(kernels.gate(x, "silu")[:, 4:8], torch.nn.functional.silu(x[:, 4:8].float()))
    assert torch.isfinite(kernels.gate(x, "silu")).all()


def test_shapes_that_tiles_do_not_take_go_to_the_reference(kernels: native.NativeKernels) -> None:
    assert isinstance(kernels.linear([torch.randn(8, 24).to(BFLOAT)], None), reference.DenseLinear)
    x = torch.randn(3, 4, 24).to(BFLOAT)
    places = Places(*torch.randn(2, 3, 1, 24), torch.tensor([0, 0, 1]), torch.tensor([2, 3, 0]))
    written = [PagedKv(torch.zeros(2, 1, 2, 4, 1, 24).to(BFLOAT)) for _ in range(2)]
    found = kernels.rotate_and_write(x, None, places, written[0], 0)
    assert torch.equal(found, reference.rotate_and_write(x, None, places, written[1], 0))
    assert torch.equal(written[0].data, written[1].data)
    weight = torch.rand(24).to(BFLOAT)
    assert torch.equal(kernels.rms_norm(x[:, 0], weight, 1e-5), reference.rms_norm(x[:, 0], weight, 1e-5))
    assert torch.equal(kernels.gate(x[:, 0], "gelu"), reference.gate(x[:, 0], "gelu"))
    kv, batch = torch.randn(8, 1, 2, 8, 2, 64).to(BFLOAT), make_batch([(4, 1), (0, 9)], 2, 8)
    query = torch.randn(10, 4, 64).to(BFLOAT)
    expected = reference.attend(query, PagedKv(kv), 0, batch, AttentionSpec(0.125))
    assert torch.equal(kernels.attend(query, PagedKv(kv), 0, batch, AttentionSpec(0.125)), expected)


def test_threads_change_nothing(kernels: native.NativeKernels) -> None:
    before = torch.get_num_threads()
    kv, batch = torch.randn(64, 1, 2, 16, 2, 64).to(BFLOAT), make_batch(LENGTHS, 20, 64)
    query = torch.randn(int(batch.query_starts[-1]), 4, 64).to(BFLOAT)
    linear, x = kernels.linear([torch.randn(320, 1088).to(BFLOAT)], None), torch.randn(200, 1088).to(BFLOAT)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((linear(x), kernels.attend(query, PagedKv(kv), 0, batch, AttentionSpec(0.125))))
    finally:
        torch.set_num_threads(before)
    for product, attended in results[1:]:
        assert torch.equal(product, results[0][0])
        assert torch.equal(attended, results[0][1])


def test_compiles_into_the_given_folder_once(
    kernels: native.NativeKernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    assert library.load(library.AMX)
    [made] = (tmp_path / "cache").iterdir()
    written = made.stat().st_mtime_ns
    assert library.load(library.AMX)
    assert [made] == list((tmp_path / "cache").iterdir())
    assert made.stat().st_mtime_ns == written


def test_without_a_compiler_or_with_a_broken_one_torch_does_it(
    kernels: native.NativeKernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "/bin/false")
    with caplog.at_level(logging.WARNING):
        assert native.load(REFERENCE) is None
    monkeypatch.setenv("CC", "absent")
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert native.load(REFERENCE) is None
    assert "no C compiler" in caplog.text
