"""The KV memory of one worker: tensors for kernels, regions of bytes for the transfer layer.

    block b:  [b * block_bytes, (b + 1) * block_bytes)      nonce: 16 bytes after the last block

On CPU it is an anonymous file (memfd) that a process of the same host can map read-only; its pages are committed when
first written. On a GPU transfers go through ``DeviceBlocks``, beside the steps. Knows blocks as numbered regions; knows
nothing of who owns them.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import sys

import torch
from torch import Tensor

from engine import device_blocks
from engine.device_blocks import CudaLane, DeviceBlocks
from kernels.types import PagedKv
from proto.layout import KvLayout, MemoryExport

NONCE_BYTES = 16


class KvMemory:
    """``paged`` is the memory as kernels see it; only a block's owner writes it.

    ``close()`` ends the export and must come last: views of ``read`` stay valid as long as they are referenced.
    """

    def __init__(self, layout: KvLayout, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = device
        self._mapped: memoryview | None = None
        self._export: MemoryExport | None = None
        self._device_blocks: DeviceBlocks | None = None
        size = num_blocks * layout.block_bytes
        if device.type == "cpu":
            mapped = self._map(size)
            self._mapped = memoryview(mapped)
            regions = torch.frombuffer(mapped, dtype=torch.uint8, count=size)
        else:
            memory = torch.zeros(size + NONCE_BYTES, dtype=torch.uint8, device=device)
            self._device_blocks = DeviceBlocks(
                memory,
                num_blocks,
                layout.block_bytes,
                secrets.token_bytes(NONCE_BYTES),
                lane=CudaLane(device),
                kernels=device_blocks.choose(device, layout.block_bytes),
            )
            regions = memory[:size]
        self._regions = regions.view(num_blocks, layout.block_bytes)
        self.paged = _paged(self._regions, layout)

    def _map(self, size: int) -> mmap.mmap:
        """``size`` bytes of zeros and the nonce. Where the system has no memfd, the memory cannot be exported."""
        if sys.platform != "linux":
            return mmap.mmap(-1, size + NONCE_BYTES)
        fd = os.memfd_create("tandem-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size + NONCE_BYTES)
        # A reader maps it too: memory that shrank under it would kill it with SIGBUS.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        mapped = mmap.mmap(fd, size + NONCE_BYTES)
        nonce = secrets.token_bytes(NONCE_BYTES)
        mapped[size:] = nonce
        self._export = MemoryExport(os.getpid(), fd, size + NONCE_BYTES, size, nonce)
        return mapped

    def read(self, block: int) -> memoryview:
        """The block's bytes, read-only: on CPU a view without a copy, on a GPU a copy."""
        start = self._offset(block)
        if self._mapped is not None:
            return self._mapped[start : start + self.layout.block_bytes].toreadonly()
        assert self._device_blocks is not None
        return memoryview(self._device_blocks.read(block))

    def write(self, block: int, data: bytes | memoryview) -> None:
        """Copies ``data``, ``layout.block_bytes`` long, into the block."""
        start = self._offset(block)
        assert len(data) == self.layout.block_bytes, f"a block has {self.layout.block_bytes} bytes, not {len(data)}"
        if self._mapped is not None:
            self._mapped[start : start + len(data)] = data
            return
        assert self._device_blocks is not None
        self._device_blocks.write(block, data)

    def copy(self, source: int, destination: int) -> None:
        """Makes ``destination`` equal to ``source``."""
        self._regions[destination].copy_(self._regions[source])

    def zero_tail(self, block: int, num_valid_tokens: int) -> None:
        """Zeroes the block's slots from ``num_valid_tokens`` on, in every layer: equal tokens, then equal bytes."""
        self.paged.data[block, :, :, num_valid_tokens:] = 0
        if self.paged.scales is not None:
            self.paged.scales[block, ..., num_valid_tokens:] = 0

    def fence(self) -> None:
        """For the engine's thread: transfers from now on come behind what it has queued so far."""
        if self._device_blocks is not None:
            self._device_blocks.fence()

    def on_device(self) -> DeviceBlocks | None:
        """The memory for copies on the GPU; None on CPU."""
        return self._device_blocks

    def export(self) -> MemoryExport | None:
        """Where a process of this host can map the memory; None on a GPU and after ``close``."""
        return self._export

    def close(self) -> None:
        """Closes the exported descriptor. The memory itself goes with its last reference. May be called twice."""
        if self._export is not None:
            os.close(self._export.fd)
            self._export = None

    def _offset(self, block: int) -> int:
        assert 0 <= block < self.num_blocks, f"block {block} of {self.num_blocks}"
        return block * self.layout.block_bytes


def _paged(regions: Tensor, layout: KvLayout) -> PagedKv:
    """``regions [num_blocks, block_bytes]`` as keys and values, and their scales: views of the same memory."""
    outer, heads = (regions.shape[0], layout.num_layers, 2), layout.kv_heads
    data = regions[:, : layout.data_bytes].view(getattr(torch, layout.dtype))
    data = data.view(*outer, layout.block_size, heads, layout.head_dim)
    if not layout.has_scales:
        return PagedKv(data)
    scales = regions[:, layout.data_bytes :].view(torch.float32)
    return PagedKv(data, scales.view(*outer, heads, layout.block_size))
