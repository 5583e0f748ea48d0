"""KV memory as bytes and as a tensor, and how another process maps it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from engine.kv_memory import KvMemory
from proto.layout import KvLayout

LAYOUT = KvLayout(num_layers=3, block_size=4, kv_heads=2, head_dim=8, dtype="bfloat16", model_digest="m")
CPU = torch.device("cpu")


@pytest.fixture
def kv() -> Iterator[KvMemory]:
    memory = KvMemory(LAYOUT, 5, CPU)
    yield memory
    memory.close()


def fill(kv: KvMemory) -> None:
    kv.paged.data.copy_(torch.randn(kv.paged.data.shape))


def test_a_block_is_one_contiguous_region(kv: KvMemory) -> None:
    fill(kv)
    assert kv.paged.data.shape == (5, 3, 2, 4, 2, 8)
    data = kv.read(3)
    assert len(data) == LAYOUT.block_bytes
    assert bytes(data) == kv.paged.data[3].contiguous().view(torch.uint8).numpy().tobytes()
    for span in LAYOUT.spans():
        part = kv.paged.data[3, span.layer, ("key", "value").index(span.part)]
        assert (
            bytes(data[span.offset : span.offset + span.num_bytes])
            == part.contiguous().view(torch.uint8).numpy().tobytes()
        )


def test_read_is_a_view_that_cannot_write(kv: KvMemory) -> None:
    view = kv.read(0)
    kv.paged.data[0] = 1.0
    assert view[1] == 0x3F
    with pytest.raises(TypeError):
        view[0] = 1


def test_write_changes_one_block(kv: KvMemory) -> None:
    fill(kv)
    before = kv.paged.data.clone()
    kv.write(1, kv.read(4))
    assert torch.equal(kv.paged.data[1], before[4])
    assert torch.equal(kv.paged.data[[0, 2, 3, 4]], before[[0, 2, 3, 4]])
    for data in (b"", bytes(LAYOUT.block_bytes + 1)):
        with pytest.raises(AssertionError):
            kv.write(1, data)
    for block in (-1, 5):
        with pytest.raises(AssertionError):
            kv.read(block)


def test_copy_and_zero_tail(kv: KvMemory) -> None:
    fill(kv)
    before = kv.paged.data.clone()
    kv.copy(0, 2)
    assert torch.equal(kv.paged.data[2], before[0])
    kv.zero_tail(2, 3)
    assert torch.equal(kv.paged.data[2, :, :, :3], before[0, :, :, :3])
    assert not kv.paged.data[2, :, :, 3:].any()
    kv.zero_tail(0, 4)
    assert torch.equal(kv.paged.data[0], before[0])


def test_fp8_has_its_scales_in_the_block() -> None:
    layout = replace(LAYOUT, dtype="float8_e4m3fn")
    kv = KvMemory(layout, 3, CPU)
    data, scales = kv.paged.data, kv.paged.scales
    assert scales is not None
    assert (data.shape, scales.shape) == ((3, 3, 2, 4, 2, 8), (3, 3, 2, 2, 4))
    data.view(torch.uint8).copy_(torch.arange(data.numel()).remainder(251).view(data.shape) + 1)
    scales.copy_(torch.rand(scales.shape) + 1)
    found = bytes(kv.read(1))
    parts: list[torch.Tensor] = [data.view(torch.uint8)[1], scales[1]]
    for span in layout.spans():
        which = span.part.split()
        part = parts[len(which) - 1][span.layer, ("key", "value").index(which[0])]
        expected = part.contiguous().view(torch.uint8).numpy().tobytes()
        assert found[span.offset : span.offset + span.num_bytes] == expected
    kv.write(0, kv.read(1))
    kv.copy(1, 2)
    assert bytes(kv.read(0)) == bytes(kv.read(2)) == found
    kv.zero_tail(2, 3)
    assert not data.view(torch.uint8)[2, :, :, 3:].any()
    assert not scales[2, ..., 3:].any()
    assert torch.equal(scales[2, ..., :3], scales[1, ..., :3])
    data.view(torch.uint8)[1, :, :, 3:] = 77
    scales[1, ..., 3:] = 5.0
    kv.zero_tail(1, 3)
    assert bytes(kv.read(1)) == bytes(kv.read(2)), "equal tokens, then equal bytes"
    kv.close()


@pytest.mark.skipif(sys.platform != "linux", reason="memfd is Linux's")
def test_another_process_reads_it_in_place(kv: KvMemory) -> None:
    fill(kv)
    export = kv.export()
    assert export is not None
    assert export.nonce_offset == 5 * LAYOUT.block_bytes
    assert export.num_bytes == export.nonce_offset + len(export.nonce)
    script = (
        "import mmap, sys; file = open(sys.argv[1], 'rb'); m = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ);"
        "sys.stdout.buffer.write(m[:])"
    )
    path = f"/proc/{export.pid}/fd/{export.fd}"
    seen = subprocess.run([sys.executable, "-c", script, path], capture_output=True, check=True).stdout
    assert len(seen) == export.num_bytes
    assert seen[export.nonce_offset :] == export.nonce
    assert seen[3 * LAYOUT.block_bytes : 4 * LAYOUT.block_bytes] == bytes(kv.read(3))


@pytest.mark.skipif(sys.platform != "linux", reason="memfd is Linux's")
def test_close_ends_the_export_but_not_the_views() -> None:
    kv = KvMemory(LAYOUT, 2, CPU)
    fill(kv)
    export, view = kv.export(), kv.read(1)
    assert export is not None
    content = bytes(view)
    kv.close()
    kv.close()
    assert kv.export() is None
    with pytest.raises(OSError):
        os.fstat(export.fd)
    assert bytes(view) == content


def test_every_memory_has_its_own_nonce() -> None:
    memories = [KvMemory(LAYOUT, 1, CPU) for _ in range(3)]
    exports = [memory.export() for memory in memories]
    assert len({export.nonce for export in exports if export}) == len([export for export in exports if export])
    for memory in memories:
        memory.close()
