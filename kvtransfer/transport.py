"""The two narrow seams of a hand-off: a ``Link`` carries messages, a ``BlockStore`` is the memory at either end.

A transport is a Link plus a way for payloads to get from one store to the other: inside the frame (gRPC, in-memory), or
read by the decode side from memory the prefill side exports (shared memory).
"""

from __future__ import annotations

from typing import Protocol

from proto.handoff import HandoffMessage
from proto.ids import BlockId
from proto.layout import KvLayout, MemoryExport


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
