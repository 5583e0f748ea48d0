"""Payloads between the GPUs of one host: D maps P's KV memory and copies blocks out of it, on a stream of its own.

Frames carry places instead of bytes, as with ``shm``. D uses this once it has read P's nonce, at the end of P's memory,
through the mapping; where that fails (another host, a GPU that cannot reach P's, containers without a common IPC
namespace) another way is taken. Many blocks are one launch, beside the steps, and D adds up their checksums on its GPU
once they have arrived. P's memory is only read, so a P that was stopped and wakes up spoils nothing.

P's death takes its memory along, mapped or not, and CUDA does not say what becomes of a copy under way. Where that
costs D its context, DeviceLost says so, and D's process ends: its requests go on elsewhere.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

import msgpack
from torch import Tensor

from kvtransfer.transport import BlockStore, DeviceBlocks
from kvtransfer.transports import CUDA_IPC, Payload, detail_fields
from kvtransfer.transports.device import BATCH_BYTES, as_blocks, find_blocks
from kvtransfer.transports.mapping import Mapping, Mappings
from proto.handoff import TransportOffer
from proto.ids import BlockId, Epoch


class IpcUnavailable(Exception):
    """Memory that these processes cannot share; the message says why."""


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """How another process names device memory: ``offset`` bytes into the allocation that ``token`` opens."""

    token: bytes
    offset: int


@dataclass(frozen=True, slots=True)
class OpenedMemory:
    """Another process's memory here: ``memory`` (uint8) lies in the allocation that begins at ``address``."""

    memory: Tensor
    address: int


class IpcDriver(Protocol):
    """What this transport needs of CUDA: see ``CudaDriver``. Called from any thread."""

    def share(self, memory: Tensor) -> SharedMemory:
        """Raises IpcUnavailable. The memory must live as long as this process."""

    def open(self, shared: SharedMemory, num_bytes: int, near: Tensor) -> OpenedMemory:
        """For use by the device of ``near``. Not twice for one token. Raises IpcUnavailable."""

    def close(self, opened: OpenedMemory, near: Tensor) -> None:
        """Nothing reads it any more."""


@dataclass(frozen=True, slots=True)
class DeviceExport:
    """Where a process of this host finds a worker's KV memory. ``pid`` counts in ``pid_namespace``."""

    pid: int
    pid_namespace: int
    token: bytes
    offset: int
    num_bytes: int
    nonce: bytes
    """The last bytes of the memory."""


def cuda_ipc_offer(driver: IpcDriver, device: DeviceBlocks) -> TransportOffer:
    """What P says of its memory. Raises IpcUnavailable."""
    shared = driver.share(device.memory)
    export = DeviceExport(
        os.getpid(), _pid_namespace(), shared.token, shared.offset, device.memory.numel(), device.nonce
    )
    return TransportOffer(CUDA_IPC, msgpack.packb(astuple(export)))


def read_export(detail: bytes) -> DeviceExport | None:
    """What D understands of it; None where that is nothing."""
    fields = detail_fields(detail, 6)
    if fields is None:
        return None
    pid, namespace, token, offset, num_bytes, nonce = fields
    numbers, texts = (pid, namespace, offset, num_bytes), (token, nonce)
    if not all(type(number) is int and number >= 0 for number in numbers):
        return None
    if not all(isinstance(text, bytes) and text for text in texts) or len(nonce) > num_bytes:
        return None
    return DeviceExport(pid, namespace, token, offset, num_bytes, nonce)


def _pid_namespace() -> int:
    """Which processes our pids count; 0 where the system does not say."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


class CudaIpcReader:
    """D's mappings: one per incarnation of P, closed when its process ends."""

    name = CUDA_IPC

    def __init__(self, driver: IpcDriver) -> None:
        self._driver = driver
        self._mappings: Mappings[_Mapped] = Mappings(_Mapped.close)
        self._opening = asyncio.Lock()

    @property
    def num_mappings(self) -> int:
        return len(self._mappings)

    async def open(self, detail: bytes, epoch: Epoch, store: BlockStore) -> CudaIpcSource | None:
        device, export = store.on_device(), read_export(detail)
        if device is None or export is None:
            return None
        async with self._opening:  # a token is opened once
            mapping = self._mappings.get(epoch)
            if mapping is None:
                mapped = await asyncio.to_thread(_map, self._driver, export, device)
                if mapped is None:
                    return None
                is_our_number = export.pid_namespace == _pid_namespace() != 0
                mapping = self._mappings.keep(epoch, mapped, export.pid if is_our_number else None)
            return CudaIpcSource(mapping, device, store.layout.block_bytes)

    def forget(self, epoch: Epoch) -> None:
        """That incarnation is over. Its memory is unmapped when the last source that reads it is closed."""
        self._mappings.forget(epoch)

    def close(self) -> None:
        self._mappings.close()


class CudaIpcSource:
    """One hand-off's use of a mapping."""

    batch_bytes = BATCH_BYTES

    def __init__(self, mapping: Mapping[_Mapped], device: DeviceBlocks, block_bytes: int) -> None:
        self._mapping: Mapping[_Mapped] | None = mapping
        self._device = device
        self._theirs = as_blocks(mapping.memory.blocks, block_bytes)
        mapping.take()

    async def place(self, payloads: Sequence[Payload], blocks: Sequence[BlockId], store: BlockStore) -> list[bool]:
        assert self._mapping is not None, "a closed source is not read"
        found = find_blocks(payloads, blocks, store.layout.block_bytes, len(self._theirs))
        if found.ours:
            await asyncio.to_thread(self._device.copy_in, self._theirs, found.theirs, found.ours)
        return found.are_found

    def close(self) -> None:
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            mapping.give_back()


class _Mapped:
    """P's memory, less the nonce, and how it is given back."""

    def __init__(self, driver: IpcDriver, opened: OpenedMemory, near: Tensor, num_bytes: int) -> None:
        self.blocks = opened.memory[:num_bytes]
        self._close = functools.partial(driver.close, opened, near)

    def close(self) -> None:
        self._close()


def _map(driver: IpcDriver, export: DeviceExport, device: DeviceBlocks) -> _Mapped | None:
    """None where it cannot be mapped, or is not what its owner meant."""
    near = device.memory
    try:
        opened = driver.open(SharedMemory(export.token, export.offset), export.num_bytes, near)
    except IpcUnavailable:
        return None
    size = export.num_bytes - len(export.nonce)
    try:
        with device.beside_steps():
            found = opened.memory[size:].cpu().numpy().tobytes()
    except RuntimeError:
        found = b""
    if found != export.nonce:
        driver.close(opened, near)
        return None
    return _Mapped(driver, opened, near, size)
