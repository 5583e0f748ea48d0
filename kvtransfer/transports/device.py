"""What transports share that fetch blocks themselves: sums on a device, which blocks of a peer are wanted where.

Knows tensors; knows nothing of how memory gets from one process to another.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kvtransfer.integrity import finalise, key_words
from kvtransfer.transport import BlockStore, DeviceBlocks
from kvtransfer.transports import Payload, located_block
from proto.errors import RemoteProtocolError
from proto.ids import BlockHash, BlockId

BATCH_BYTES = 256 << 20
"""How much is best moved or summed in one call: enough to hide the launch, little enough to be soon done."""


class DeviceSums:
    """Checksums of blocks on a GPU, added up there; 8 bytes of each come to the CPU, which seeds them."""

    batch_bytes = BATCH_BYTES

    def __init__(self, device: DeviceBlocks, block_bytes: int) -> None:
        self._device = device
        self._block_bytes = block_bytes
        self._key = device_key(block_bytes, device.memory.device)

    def of(self, blocks: Sequence[BlockId], hashes: Sequence[BlockHash]) -> list[int]:
        totals = self._device.totals(blocks, self._key)
        return [finalise(total, name, self._block_bytes) for total, name in zip(totals, hashes, strict=True)]


@functools.lru_cache(maxsize=8)
def device_key(block_bytes: int, device: torch.device) -> Tensor:
    """The key for blocks of that size, as int64, on the device. As large as a block, so made once."""
    words = key_words(-(-block_bytes // 8) * 2).view(np.int64)
    return torch.from_numpy(words.copy()).to(device)


def as_blocks(memory: Tensor, block_bytes: int) -> Tensor:
    """``[blocks, block_bytes]``: as many whole blocks as ``memory`` (uint8) begins with."""
    num_blocks = memory.numel() // block_bytes
    return memory[: num_blocks * block_bytes].view(num_blocks, block_bytes)


@dataclass(frozen=True, slots=True)
class FoundBlocks:
    """``are_found``: for each payload, whether it points at a block. ``theirs``, ``ours``: from where, and where to."""

    are_found: list[bool] = field(default_factory=list)
    theirs: list[int] = field(default_factory=list)
    ours: list[BlockId] = field(default_factory=list)


def find_blocks(
    payloads: Sequence[Payload], blocks: Sequence[BlockId], block_bytes: int, num_blocks: int
) -> FoundBlocks:
    """Where the frames of a batch point, in a peer's memory of ``num_blocks`` blocks."""
    found = FoundBlocks()
    for payload, block in zip(payloads, blocks, strict=True):
        try:
            row = located_block(payload, block_bytes, num_blocks)
        except RemoteProtocolError:
            found.are_found.append(False)
            continue
        found.are_found.append(True)
        found.theirs.append(row)
        found.ours.append(block)
    return found


class Peer(Protocol):
    """A process whose blocks are fetched, as long as anybody uses it."""

    @property
    def num_blocks(self) -> int: ...

    def take(self) -> None: ...

    def give_back(self) -> None: ...

    async def fetch(self, theirs: Sequence[int], ours: Sequence[BlockId]) -> bool:
        """Its blocks into ours; False where that failed. Raises DeviceLost."""


class PeerSource:
    """One hand-off's use of a peer. As ``PayloadSource``."""

    def __init__(self, peer: Peer, batch_bytes: int) -> None:
        self.batch_bytes = batch_bytes
        self._peer: Peer | None = peer
        peer.take()

    async def place(self, payloads: Sequence[Payload], blocks: Sequence[BlockId], store: BlockStore) -> list[bool]:
        assert self._peer is not None, "a closed source is not read"
        found = find_blocks(payloads, blocks, store.layout.block_bytes, self._peer.num_blocks)
        if found.ours and not await self._peer.fetch(found.theirs, found.ours):
            return [False] * len(payloads)
        return found.are_found

    def close(self) -> None:
        peer, self._peer = self._peer, None
        if peer is not None:
            peer.give_back()
