"""Payloads within one host: D maps the memory that P exports, read-only, and copies blocks out of it.

Frames carry places instead of bytes, over whatever link the hand-off has. D alone decides to use it, once it has found
P's nonce where P said it would be: another host or container, another user, or a pid used again, fall back to gRPC.
P may reuse a block while D still reads it, should D be late: the checksum, taken while P held the block, then fails.
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Sequence
from dataclasses import astuple

import msgpack

from kvtransfer.transport import BlockStore
from kvtransfer.transports import HOST_BATCH_BYTES, SHM, Payload, detail_fields, located_block, place_each
from kvtransfer.transports.mapping import Mapping, Mappings
from proto.handoff import TransportOffer
from proto.ids import BlockId, Epoch
from proto.layout import MemoryExport


def shm_offer(export: MemoryExport) -> TransportOffer:
    """What P says of its memory."""
    return TransportOffer(SHM, msgpack.packb(astuple(export)))


def read_export(detail: bytes) -> MemoryExport | None:
    """What D understands of it; None where that is nothing."""
    fields = detail_fields(detail, 5)
    if fields is None:
        return None
    *numbers, nonce = fields
    if not all(type(number) is int and number >= 0 for number in numbers) or not isinstance(nonce, bytes) or not nonce:
        return None
    pid, fd, num_bytes, nonce_offset = numbers
    if nonce_offset + len(nonce) > num_bytes:
        return None
    return MemoryExport(pid, fd, num_bytes, nonce_offset, nonce)


class ShmReader:
    """D's mappings. For one event loop."""

    name = SHM

    def __init__(self) -> None:
        self._mappings: Mappings[_Mapped] = Mappings(_Mapped.unmap)

    @property
    def num_mappings(self) -> int:
        return len(self._mappings)

    async def open(self, detail: bytes, epoch: Epoch, store: BlockStore) -> ShmSource | None:
        mapping = self._mappings.get(epoch)
        if mapping is None:
            export = read_export(detail)
            if export is None or (mapped := _map(export)) is None:
                return None
            # Its file was found under its pid: the number means that process here, too.
            mapping = self._mappings.keep(epoch, mapped, export.pid)
        return ShmSource(mapping, store.layout.block_bytes)

    def forget(self, epoch: Epoch) -> None:
        """That incarnation is over. Its memory goes with the last source that reads it."""
        self._mappings.forget(epoch)

    def close(self) -> None:
        self._mappings.close()


class ShmSource:
    """One hand-off's view of a mapping."""

    batch_bytes = HOST_BATCH_BYTES

    def __init__(self, mapping: Mapping[_Mapped], block_bytes: int) -> None:
        self._mapping: Mapping[_Mapped] | None = mapping
        self._block_bytes = block_bytes
        mapping.take()

    async def place(self, payloads: Sequence[Payload], blocks: Sequence[BlockId], store: BlockStore) -> list[bool]:
        return await place_each(self.fetch, payloads, blocks, store)

    def fetch(self, payload: Payload) -> memoryview:
        """The block in P's memory, without a copy. Raises RemoteProtocolError where there is none."""
        assert self._mapping is not None, "a closed source is not read"
        mapped = self._mapping.memory
        start = self._block_bytes * located_block(payload, self._block_bytes, mapped.num_bytes // self._block_bytes)
        return mapped.view[start : start + self._block_bytes]

    def close(self) -> None:
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            mapping.give_back()


class _Mapped:
    """``num_bytes`` of blocks, read-only."""

    def __init__(self, export: MemoryExport, mapped: mmap.mmap) -> None:
        self.num_bytes = export.nonce_offset
        self.view = memoryview(mapped)
        self._mapped = mapped

    def unmap(self) -> None:
        self.view.release()
        self._mapped.close()


def _map(export: MemoryExport) -> _Mapped | None:
    """None where it cannot be mapped, or is not what its owner meant."""
    try:
        # Never waits, whatever the number turns out to be: a pipe, say, or another process's file.
        fd = os.open(f"/proc/{export.pid}/fd/{export.fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode) or about.st_size != export.num_bytes:
            return None
        if os.pread(fd, len(export.nonce), export.nonce_offset) != export.nonce:
            return None
        return _Mapped(export, mmap.mmap(fd, export.num_bytes, prot=mmap.PROT_READ))
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)
