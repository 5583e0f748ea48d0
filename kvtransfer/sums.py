"""Checksums of blocks where they lie: in memory that the CPU reads, or on a GPU, which adds up its own.

The definition is ``kvtransfer.integrity``'s, and the same for both. Knows blocks and hashes; loads torch only where the
memory is a GPU's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvtransfer.integrity import BlockChecksum
from kvtransfer.transport import BlockStore
from proto.ids import BlockHash, BlockId

HOST_BATCH_BYTES = 8 << 20
"""How much is best summed at a time: some milliseconds' work."""


class BlockSums(Protocol):
    @property
    def batch_bytes(self) -> int:
        """How much is best summed in one call."""

    def of(self, blocks: Sequence[BlockId], hashes: Sequence[BlockHash]) -> list[int]:
        """The checksum of each block, as that of the hash beside it. Called from any thread."""


class HostSums:
    """Of memory that ``read`` shows without a copy."""

    batch_bytes = HOST_BATCH_BYTES

    def __init__(self, store: BlockStore) -> None:
        self._store = store
        self._checksum = BlockChecksum(store.layout.block_bytes)

    def of(self, blocks: Sequence[BlockId], hashes: Sequence[BlockHash]) -> list[int]:
        return [self._checksum.of(self._store.read(block), name) for block, name in zip(blocks, hashes, strict=True)]


def block_sums(store: BlockStore) -> BlockSums:
    device = store.on_device()
    if device is None:
        return HostSums(store)
    from kvtransfer.transports.device import DeviceSums

    return DeviceSums(device, store.layout.block_bytes)
