"""The two narrow seams of a hand-off: a ``Link`` carries messages, a ``BlockStore`` is the memory at either end.

A transport is a Link plus a way for payloads to get from one store to the other: inside the frame (gRPC, in-memory), or
read by the decode side out of the prefill side's memory (shared memory, CUDA IPC, NIXL), or sent from there (NCCL).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from proto.handoff import HandoffMessage
from proto.ids import BlockId
from proto.layout import KvLayout, MemoryExport

if TYPE_CHECKING:
    from torch import Tensor  # what a GPU's memory is to Python; whoever has no GPU loads no torch for it


class LinkLost(Exception):
    """The link is broken or closed by the peer; nothing more will arrive."""


class Link(Protocol):
    """An ordered pipe of messages between the two halves of one hand-off."""

    async def send(self, message: HandoffMessage) -> None:
        """Returns once the message is on its way; waits while the peer is slow. Raises LinkLost."""

    async def receive(self) -> HandoffMessage:
        """The next message. Raises LinkLost at the end."""

    async def close(self) -> None:
        """May be called twice, and while the other calls wait (they raise LinkLost)."""


class BlockStore(Protocol):
    """One worker's KV memory, block by block. Only its owner writes, and only blocks it has reserved.

    ``read`` and ``write`` are called from several threads at once, never for one block while it is being written.
    """

    @property
    def layout(self) -> KvLayout: ...

    def read(self, block: BlockId) -> memoryview:
        """The block's ``layout.block_bytes`` bytes; on CPU a view without a copy."""

    def write(self, block: BlockId, data: bytes | memoryview) -> None:
        """Copies ``data`` (``layout.block_bytes`` long) into the block."""

    def export(self) -> MemoryExport | None:
        """Where a process of this host can map the memory; None where it cannot."""

    def on_device(self) -> DeviceBlocks | None:
        """The memory for copies that stay on a GPU; None where ``read`` and ``write`` are all there is."""


class DeviceBlocks(Protocol):
    """KV memory on a GPU, many blocks at a time. Calls come from any thread, and return when their work is done.

    Each raises DeviceLost where this process can use its GPU no more.
    """

    @property
    def memory(self) -> Tensor:
        """All of it, uint8: the blocks, one after the other, and ``nonce`` behind the last one."""

    @property
    def nonce(self) -> bytes: ...

    def copy_in(self, source: Tensor, rows: Sequence[int], blocks: Sequence[BlockId]) -> None:
        """Rows of ``source [rows, block_bytes]`` into ``blocks``."""

    def copy_out(self, blocks: Sequence[BlockId], target: Tensor) -> None:
        """``blocks`` into the first rows of ``target [rows, block_bytes]``."""

    def totals(self, blocks: Sequence[BlockId], key: Tensor) -> list[int]:
        """Of each block the ``total`` of ``kvtransfer.integrity``, for a key of 64-bit words as int64."""

    def beside_steps(self) -> AbstractContextManager[None]:
        """What another library queues inside runs beside the engine's steps."""

    def landing(self, num_bytes: int) -> Tensor:
        """Memory on the device, uint8, that nothing which is queued there uses: to be written at once, from outside."""
