"""KV memory on a GPU as transfers use it: whole blocks, many at a time, on a stream of their own beside the steps.

    engine's thread    step that fills a prompt's blocks ── fence() ── step ── step ──▶
    any other thread                                           └──▶ copies and sums; steps go on meanwhile

Every call returns when its work is done. Knows blocks as numbered regions; knows nothing of who owns them.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.reference import blocks as reference
from proto.errors import DeviceLost

Copy = Callable[[Tensor, Tensor, Tensor, Tensor], None]
Sum = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class BlockKernels:
    """As their namesakes in ``kernels.reference.blocks``."""

    copy_blocks: Copy
    sum_blocks: Sum


REFERENCE = BlockKernels(reference.copy_blocks, reference.sum_blocks)


def choose(device: torch.device, block_bytes: int) -> BlockKernels:
    """Triton's where it is there; torch's own operations do as well, slower."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return REFERENCE
    from kernels.triton import blocks

    return BlockKernels(blocks.copy_blocks, blocks.sum_blocks) if blocks.takes(block_bytes) else REFERENCE


class Lane(Protocol):
    """Where transfers' work is queued."""

    def fence(self) -> None:
        """What is entered from now on runs behind the work that this thread has queued so far."""

    def enter(self) -> AbstractContextManager[None]:
        """What is queued inside is transfers' work. It may still run at the end."""

    def finish(self) -> AbstractContextManager[None]:
        """The same, and it has been done at the end. Raises DeviceLost."""


class CudaLane:
    """A stream. May be used by several threads at once. Before the first fence it waits for all that steps queue."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._fence: torch.cuda.Event | None = None

    def fence(self) -> None:
        fence = torch.cuda.Event()  # type: ignore[no-untyped-call]
        fence.record(torch.cuda.current_stream(self._device))
        self._fence = fence

    @contextmanager
    def enter(self) -> Iterator[None]:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if self._fence is not None:
                self._stream.wait_event(self._fence)
            else:
                self._stream.wait_stream(torch.cuda.default_stream(self._device))
            yield

    @contextmanager
    def finish(self) -> Iterator[None]:
        with naming_its_loss(self._answers), self.enter():
            yield
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # the thread sleeps meanwhile
            done.record()
            done.synchronize()

    def _answers(self) -> bool:
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            return False
        return True


@contextmanager
def naming_its_loss(answers: Callable[[], bool]) -> Iterator[None]:
    """An error after which the device does not answer any more becomes DeviceLost; others pass."""
    try:
        yield
    except RuntimeError as error:
        if answers():
            raise
        raise DeviceLost(f"this process has lost its device: {error}") from error


class DeviceBlocks:
    """``memory``, uint8: ``num_blocks`` blocks, and ``nonce`` behind the last one.

    May be used by several threads at once, never for one block while it is being written.
    """

    def __init__(
        self, memory: Tensor, num_blocks: int, block_bytes: int, nonce: bytes, *, lane: Lane, kernels: BlockKernels
    ) -> None:
        size = num_blocks * block_bytes
        assert memory.numel() == size + len(nonce), "memory for the blocks and the nonce"
        self.memory = memory
        self.nonce = nonce
        self.regions = memory[:size].view(num_blocks, block_bytes)
        self._lane = lane
        self._kernels = kernels
        memory[size:] = torch.frombuffer(bytearray(nonce), dtype=torch.uint8).to(memory.device)
        # The driver would stage what is not page-locked itself, slower.
        self._staging = torch.empty(block_bytes, dtype=torch.uint8, pin_memory=memory.is_cuda)
        self._staging_lock = threading.Lock()

    def fence(self) -> None:
        """For the engine's thread: transfers from now on come behind what it has queued so far, beside what comes."""
        self._lane.fence()

    def beside_steps(self) -> AbstractContextManager[None]:
        """What is queued inside, by another library, runs beside the engine's steps."""
        return self._lane.enter()

    def landing(self, num_bytes: int) -> Tensor:
        """Memory, uint8, that is transfers' own: nothing that is queued on the device uses it. Raises DeviceLost.

        A stream's freed memory goes round within that stream, while work that is queued there may still use it. So this
        is the lane's, not that of the steps, and what the lane had queued before is done: also a network card, which
        waits for no stream, may write it.
        """
        with self._lane.finish():
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.memory.device)

    def copy_in(self, source: Tensor, rows: Sequence[int], blocks: Sequence[int]) -> None:
        """Rows of ``source [rows, block_bytes]``, which this device can read, into ``blocks``. Raises DeviceLost."""
        with self._lane.finish():
            self._kernels.copy_blocks(source, self._index(rows), self.regions, self._index(blocks))

    def copy_out(self, blocks: Sequence[int], target: Tensor) -> None:
        """``blocks`` into the first rows of ``target [rows, block_bytes]``, on this device. Raises DeviceLost."""
        with self._lane.finish():
            self._kernels.copy_blocks(self.regions, self._index(blocks), target, self._index(range(len(blocks))))

    def totals(self, blocks: Sequence[int], key: Tensor) -> list[int]:
        """Of each block what ``kvtransfer.integrity`` makes a checksum of. Raises DeviceLost."""
        with self._lane.finish():
            return self._kernels.sum_blocks(self.regions, self._index(blocks), key).tolist()

    def read(self, block: int) -> bytes:
        """Raises DeviceLost."""
        with self._staging_lock:
            with self._lane.finish():
                self._staging.copy_(self.regions[block], non_blocking=True)
            return bytes(self._staging.numpy().data)

    def write(self, block: int, data: bytes | memoryview) -> None:
        """Raises DeviceLost."""
        with self._staging_lock:
            self._staging.numpy().data[:] = data
            with self._lane.finish():
                self.regions[block].copy_(self._staging, non_blocking=True)

    def _index(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(list(numbers), dtype=torch.int64, device=self.memory.device)
