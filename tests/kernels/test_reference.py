"""The reference kernels against sums written out one by one in float64."""

from __future__ import annotations

import math

import pytest
import torch

from kernels import reference
from kernels.types import AttentionSpec, PagedKv

BLOCK, KV_HEADS, HEADS, DIM, LAYERS = 4, 2, 6, 8, 3
LAYER = 1


def make_kv(num_blocks: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_blocks, LAYERS, 2, BLOCK, KV_HEADS, DIM, generator=generator)


def slow_attention(
    query: torch.Tensor, kv: torch.Tensor, blocks: list[int], position: int, window: int | None
) -> torch.Tensor:
    """``query [heads, dim]`` at ``position``, token by token."""
    out = torch.zeros(HEADS, DIM, dtype=torch.float64)
    first = 0 if window is None else max(0, position - window + 1)
    for head in range(HEADS):
        slots = [kv[blocks[p // BLOCK], LAYER, :, p % BLOCK, head // (HEADS // KV_HEADS)] for p in range(position + 1)]
        slots = [slot.double() for slot in slots[first:]]
        weights = [math.exp(float(query[head].double() @ key) / math.sqrt(DIM)) for key, _ in slots]
        out[head] = sum(w * value for w, (_, value) in zip(weights, slots, strict=True)) / sum(weights)
    return out


@pytest.mark.parametrize("window", [None, 1, 5, 8])
def test_decode(window: int | None) -> None:
    kv = make_kv()
    lengths = [1, 4, 5, 23, 11]
    tables = [[9], [3], [1, 2], [4, 31, 5, 6, 20, 7], [10, 8, 12]]
    padded = torch.tensor([table + [table[0]] * (6 - len(table)) for table in tables])
    query = torch.randn(5, HEADS, DIM)
    out = reference.attend_decode(
        query, PagedKv(kv), LAYER, padded, torch.tensor(lengths), AttentionSpec(DIM**-0.5, window)
    )
    for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        expected = slow_attention(query[row], kv, table, length - 1, window)
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", [AttentionSpec(0.3), AttentionSpec(0.3, window=5), AttentionSpec(0.3, soft_cap=2.0)])
def test_nothing_beyond_a_sequence_changes_its_result(spec: AttentionSpec) -> None:
    kv, query, lengths = make_kv(), torch.randn(2, HEADS, DIM), torch.tensor([1, 6])
    tables = torch.tensor([[9, 9], [1, 2]])
    expected = reference.attend_decode(query, PagedKv(kv), LAYER, tables, lengths, spec)
    kv[9, :, :, 1:] = torch.nan
    kv[2, :, :, 2:] = torch.nan
    assert torch.equal(reference.attend_decode(query, PagedKv(kv), LAYER, tables, lengths, spec), expected)


@pytest.mark.parametrize("window", [None, 1, 5, 8])
@pytest.mark.parametrize(("start", "tokens"), [(0, 2), (0, 23), (3, 9), (12, 11)])
def test_chunk(start: int, tokens: int, window: int | None) -> None:
    kv = make_kv()
    blocks = [4, 31, 5, 6, 20, 7][: -(-(start + tokens) // BLOCK)]
    query = torch.randn(tokens, HEADS, DIM)
    out = reference.attend_chunk(
        query, PagedKv(kv), LAYER, torch.tensor(blocks), start, AttentionSpec(DIM**-0.5, window)
    )
    for row in range(tokens):
        expected = slow_attention(query[row], kv, blocks, start + row, window)
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 37])
def test_a_long_chunk_is_cut_without_a_seam(window: int | None) -> None:
    kv, blocks = make_kv(400), torch.randperm(400)
    query = torch.randn(1300, HEADS, DIM)
    out = reference.attend_chunk(query, PagedKv(kv), LAYER, blocks, 100, AttentionSpec(DIM**-0.5, window))
    for row in (0, 511, 512, 1299):
        expected = slow_attention(query[row], kv, blocks.tolist(), 100 + row, window)
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-5, atol=1e-6)


def test_soft_caps() -> None:
    """Scores of a few units, so that a cap of 2 bends most of them."""
    kv, spec = make_kv(), AttentionSpec(1.0, 9, soft_cap=2.0)
    query, blocks = torch.randn(14, HEADS, DIM), torch.tensor([4, 31, 5, 6])
    chunk = reference.attend_chunk(query, PagedKv(kv), LAYER, blocks, 0, spec)
    tables, lengths = blocks.expand(14, 4), torch.arange(1, 15)
    torch.testing.assert_close(reference.attend_decode(query, PagedKv(kv), LAYER, tables, lengths, spec), chunk)
    key, value = (kv[blocks, LAYER, part].flatten(0, 1)[5:14].double() for part in (0, 1))
    for head in range(HEADS):
        scores = key[:, head // 3] @ query[13, head].double()
        weights = torch.softmax(2 * torch.tanh(scores / 2), 0)
        torch.testing.assert_close(chunk[13, head].double(), weights @ value[:, head // 3], rtol=1e-5, atol=1e-6)


def fp8_kv(num_blocks: int = 32) -> PagedKv:
    data = torch.zeros(num_blocks, LAYERS, 2, BLOCK, KV_HEADS, DIM, dtype=torch.uint8)
    return PagedKv(data.view(torch.float8_e4m3fn), torch.zeros(num_blocks, LAYERS, 2, KV_HEADS, BLOCK))


@pytest.mark.parametrize("spec", [AttentionSpec(0.4), AttentionSpec(0.4, 5), AttentionSpec(0.4, None, 1.0)])
def test_fp8_is_attended_as_what_it_stands_for(spec: AttentionSpec) -> None:
    kv, blocks = fp8_kv(), torch.tensor([4, 31, 5, 6])
    new = torch.randn(14, 2, KV_HEADS, DIM) * torch.logspace(-3, 0.3, 14)[:, None, None, None]
    reference.write_kv(kv, LAYER, blocks[torch.arange(14) // BLOCK], torch.arange(14) % BLOCK, new)
    plain = make_kv()
    plain[:, LAYER] = reference.widen_kv(kv, LAYER, torch.arange(32))
    query = torch.randn(14, HEADS, DIM)
    expected = reference.attend_chunk(query, PagedKv(plain), LAYER, blocks, 0, spec)
    torch.testing.assert_close(reference.attend_chunk(query, kv, LAYER, blocks, 0, spec), expected)
    tables, lengths = blocks.expand(14, 4), torch.arange(1, 15)
    torch.testing.assert_close(reference.attend_decode(query, kv, LAYER, tables, lengths, spec), expected)


def test_fp8_keeps_every_size_of_token_to_a_sixteenth_and_never_overflows() -> None:
    new = torch.randn(300, 2, KV_HEADS, DIM) * torch.logspace(-30, 30, 300)[:, None, None, None]
    new[7, 1, 0] = 0
    data, scales = reference.quantise_kv(new)
    wide = data.float() * scales[..., None]
    assert torch.isfinite(wide).all()
    assert not wide[7, 1, 0].any()
    largest = new.abs().amax(-1, keepdim=True)
    assert bool(((wide - new).abs() <= new.abs() / 16 + largest / 448 / 512).all())


def test_the_bytes_of_a_token_do_not_depend_on_its_neighbours() -> None:
    new = torch.randn(4, 2, KV_HEADS, DIM) * torch.tensor([1.0, 100.0, 0.01, 1.0])[:, None, None, None]
    together, one_by_one = fp8_kv(), fp8_kv()
    blocks, offsets = torch.full((4,), 3), torch.arange(4)
    reference.write_kv(together, LAYER, blocks, offsets, new)
    for token in (2, 0, 3, 1):
        at = slice(token, token + 1)
        reference.write_kv(one_by_one, LAYER, blocks[at], offsets[at], new[at])
    assert torch.equal(together.data.view(torch.uint8), one_by_one.data.view(torch.uint8))
    assert together.scales is not None
    assert one_by_one.scales is not None
    assert torch.equal(together.scales, one_by_one.scales)
    assert together.scales[3, LAYER].all()
    assert not together.scales[3, :LAYER].any()


def test_write_kv_touches_only_its_slots() -> None:
    kv = make_kv()
    before = kv.clone()
    blocks, offsets = torch.tensor([3, 3, 17]), torch.tensor([0, 3, 1])
    new = torch.randn(3, 2, KV_HEADS, DIM)
    reference.write_kv(PagedKv(kv), LAYER, blocks, offsets, new)
    for index, (block, offset) in enumerate(zip(blocks.tolist(), offsets.tolist(), strict=True)):
        assert torch.equal(kv[block, LAYER, :, offset], new[index])
        kv[block, LAYER, :, offset] = before[block, LAYER, :, offset]
    assert torch.equal(kv, before)


def test_rotate_turns_pairs_in_the_plane() -> None:
    x = torch.randn(5, 3, DIM)
    angle = torch.randn(5, 1, DIM // 2)
    cos, sin = torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)
    turned = torch.complex(x[..., : DIM // 2], x[..., DIM // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(reference.rotate(x, cos, sin), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 3, 16).to(dtype), torch.rand(16).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    out = reference.rms_norm(x, weight, 1e-5)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected.to(dtype))
    per_head = weight.expand(3, 16)
    torch.testing.assert_close(reference.rms_norm(x, per_head, 1e-5), expected.to(dtype))
