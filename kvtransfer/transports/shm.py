"""Payloads within one host: D maps the memory that P exports, read-only, and copies blocks out of it.

Frames carry places instead of bytes, over whatever link the hand-off has. D alone decides to use it, once it has found
P's nonce where P said it would be: another host or container, another user, or a pid used again, fall back to gRPC.
P may reuse a block while D still reads it, should D be late: the checksum, taken while P held the block, then fails.

One mapping per incarnation of P, shared by its hand-offs and closed when its process ends: a mapping that stays
behind would keep a dead worker's whole memory.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import stat
from collections.abc import Callable
from dataclasses import astuple

import msgpack

from kvtransfer.transports import SHM, Payload
from proto.errors import RemoteProtocolError
from proto.handoff import Located, TransportOffer
from proto.ids import Epoch
from proto.layout import KvLayout, MemoryExport


def shm_offer(export: MemoryExport) -> TransportOffer:
    """What P says of its memory."""
    return TransportOffer(SHM, msgpack.packb(astuple(export)))


def read_export(detail: bytes) -> MemoryExport | None:
    """What D understands of it; None where that is nothing."""
    try:
        fields = msgpack.unpackb(detail)
    except (ValueError, msgpack.UnpackException):
        return None
    if not isinstance(fields, list) or len(fields) < 5:
        return None
    *numbers, nonce = fields[:5]
    if not all(type(number) is int and number >= 0 for number in numbers) or not isinstance(nonce, bytes) or not nonce:
        return None
    pid, fd, num_bytes, nonce_offset = numbers
    if nonce_offset + len(nonce) > num_bytes:
        return None
    return MemoryExport(pid, fd, num_bytes, nonce_offset, nonce)


class ShmReader:
    """D's mappings. For one event loop; ``fetch`` of its sources may be called from any thread."""

    name = SHM

    def __init__(self) -> None:
        self._mappings: dict[Epoch, _Mapping] = {}

    @property
    def num_mappings(self) -> int:
        return len(self._mappings)

    def open(self, detail: bytes, epoch: Epoch, layout: KvLayout) -> ShmSource | None:
        mapping = self._mappings.get(epoch)
        if mapping is None:
            export = read_export(detail)
            if export is None or (mapping := _map(export)) is None:
                return None
            self._mappings[epoch] = mapping
            if not mapping.watch(lambda: self.forget(epoch)):
                # Nobody will say when its process ends: not kept longer than it is used.
                mapping.on_idle = lambda: self.forget(epoch)
        return ShmSource(mapping, layout.block_bytes)

    def forget(self, epoch: Epoch) -> None:
        """That incarnation is over. Its memory goes with the last source that reads it."""
        mapping = self._mappings.pop(epoch, None)
        if mapping is not None:
            mapping.retire()

    def close(self) -> None:
        for epoch in list(self._mappings):
            self.forget(epoch)


class ShmSource:
    """One hand-off's view of a mapping."""

    def __init__(self, mapping: _Mapping, block_bytes: int) -> None:
        self._mapping: _Mapping | None = mapping
        self._block_bytes = block_bytes
        mapping.num_users += 1

    def fetch(self, payload: Payload) -> memoryview:
        assert self._mapping is not None, "a closed source is not read"
        if not isinstance(payload, Located):
            raise RemoteProtocolError("a payload inside a frame, where shared memory was agreed")
        end = payload.offset + self._block_bytes
        if payload.offset % self._block_bytes or end > self._mapping.num_bytes:
            raise RemoteProtocolError(f"no block lies at {payload.offset} of the shared memory")
        return self._mapping.view[payload.offset : end]

    def close(self) -> None:
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            mapping.num_users -= 1
            mapping.settle()


class _Mapping:
    """A peer's memory, and a handle of its process that tells of its end."""

    def __init__(self, export: MemoryExport, mapped: mmap.mmap) -> None:
        self.num_bytes = export.nonce_offset
        self.num_users = 0
        self.on_idle: Callable[[], None] | None = None
        self.view = memoryview(mapped)
        self._mapped = mapped
        self._pid = export.pid
        self._process: int | None = None
        self._is_retired = False

    def watch(self, on_end: Callable[[], None]) -> bool:
        """Calls ``on_end`` when the process ends. False where the system cannot tell."""
        try:
            self._process = os.pidfd_open(self._pid)
        except (OSError, AttributeError):
            return False
        asyncio.get_running_loop().add_reader(self._process, on_end)
        return True

    def retire(self) -> None:
        self._is_retired = True
        if self._process is not None:
            asyncio.get_running_loop().remove_reader(self._process)
            os.close(self._process)
            self._process = None
        self.settle()

    def settle(self) -> None:
        if self.num_users:
            return
        if self._is_retired:
            self.view.release()
            self._mapped.close()
        elif self.on_idle is not None:
            self.on_idle()


def _map(export: MemoryExport) -> _Mapping | None:
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
        return _Mapping(export, mmap.mmap(fd, export.num_bytes, prot=mmap.PROT_READ))
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)
