"""GPU memory without a GPU: ``DeviceBlocks`` over CPU tensors, whose stream and driver are made up.

DeviceStore    a worker's KV memory "on a device"
Lane           notes what its users ask of a stream, and can lose the device
FakeDriver     memory that is shared between processes by a file, named by a token
gloo_group     what NCCL's group is between GPUs, between CPUs
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from engine.device_blocks import REFERENCE, BlockKernels, DeviceBlocks, naming_its_loss
from kvtransfer.transports.cuda_ipc import IpcUnavailable, OpenedMemory, SharedMemory
from kvtransfer.transports.ring import Group, Meeting
from proto.ids import BlockId
from proto.layout import KvLayout
from tests.support.handoff import Store

NONCE = b"on the device..."


@dataclass
class Lane:
    """``fault`` is raised where work would be waited for; ``answers``: whether the device still does after that."""

    told: list[str] = field(default_factory=list)
    fault: RuntimeError | None = None
    answers: bool = True

    def fence(self) -> None:
        self.told.append("fence")

    @contextmanager
    def enter(self) -> Iterator[None]:
        self.told.append("enter")
        yield

    @contextmanager
    def finish(self) -> Iterator[None]:
        with naming_its_loss(lambda: self.answers), self.enter():
            yield
            self.told.append("finish")
            if self.fault is not None:
                raise self.fault

    def lose_device(self) -> None:
        self.fault, self.answers = RuntimeError("CUDA error: an illegal memory access was encountered"), False


class DeviceStore(Store):
    """``on_device`` is what transports see; ``export`` there is none. ``memory``: where it is to lie."""

    def __init__(
        self,
        num_blocks: int,
        layout: KvLayout,
        *,
        kernels: BlockKernels = REFERENCE,
        memory: Tensor | None = None,
    ) -> None:
        super().__init__(0, layout)
        size = num_blocks * layout.block_bytes + len(NONCE)
        memory = torch.zeros(size, dtype=torch.uint8) if memory is None else memory
        self.lane = Lane()
        self.blocks = DeviceBlocks(memory, num_blocks, layout.block_bytes, NONCE, lane=self.lane, kernels=kernels)

    def on_device(self) -> DeviceBlocks:
        return self.blocks

    def read(self, block: BlockId) -> memoryview:
        return memoryview(self.blocks.read(block))

    def write(self, block: BlockId, data: bytes | memoryview) -> None:
        self.blocks.write(block, data)


class FakeDriver:
    """Memory made by ``allocate`` can be opened by its token, in any process of this host."""

    def __init__(self, on_close: Callable[[], None] = lambda: None) -> None:
        self.opened: list[int] = []
        self.closed: list[int] = []
        self._on_close = on_close
        self._files: dict[int, str] = {}

    def allocate(self, num_bytes: int) -> Tensor:
        """``num_bytes`` in the middle of an allocation, as torch might give them."""
        fd = os.memfd_create("device")
        os.ftruncate(fd, num_bytes + 512)
        memory = torch.frombuffer(mmap.mmap(fd, 0), dtype=torch.uint8)[512:]
        self._files[memory.data_ptr()] = f"/proc/{os.getpid()}/fd/{fd}"
        return memory

    def share(self, memory: Tensor) -> SharedMemory:
        name = self._files.get(memory.data_ptr())
        if name is None:
            raise IpcUnavailable("cannot share this memory: operation not supported")
        return SharedMemory(name.encode(), 512)

    def open(self, shared: SharedMemory, num_bytes: int, near: Tensor) -> OpenedMemory:
        try:
            with Path(shared.token.decode()).open("r+b") as file:
                mapped = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)
        except (OSError, ValueError) as error:
            raise IpcUnavailable(f"cannot open the peer's memory: {error}") from error
        self.opened.append(mapped.data_ptr())
        return OpenedMemory(mapped[shared.offset : shared.offset + num_bytes], mapped.data_ptr())

    def close(self, opened: OpenedMemory, near: Tensor) -> None:
        self.closed.append(opened.address)
        self._on_close()


def gloo_group(meeting: Meeting, rank: int) -> Group:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
    options._timeout = timedelta(seconds=10)
    return dist.ProcessGroupGloo(meeting, rank, 2, options)
