"""One communicator of two processes, and the ring at each end through which blocks go from P's GPU to D's.

    P   blocks ──copy_out──▶ half of the ring ══ one message ══▶ half of the ring ──copy_in──▶ blocks   D
                             while the other half is on its way

Written over torch's process groups. Messages have no tags: both ends must name the same blocks, in the same order, so
whoever uses this has told the other what comes. Anything that goes wrong ends the communicator; another is made then.
What is received lands in the ring alone, so a peer that wakes up late writes into nothing that is used.

Proved between two processes over Gloo. Over NCCL it has not been seen to run: it needs two GPUs.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol, TypeVar, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from kvtransfer.transport import DeviceBlocks
from proto.ids import BlockId

RING_BYTES = 64 << 20
STALL = timedelta(seconds=10)
"""A message that takes longer is given up, and the communicator with it."""
P_RANK, D_RANK = 0, 1

T = TypeVar("T")


class RingBroken(Exception):
    """This communicator is over."""


class Work(Protocol):
    def wait(self, timeout: timedelta) -> bool:
        """Returns when it is done. Raises RuntimeError."""


class Group(Protocol):
    """What is used of a torch.distributed.Backend."""

    def send(self, tensors: list[Tensor], peer: int, tag: int, /) -> Work: ...

    def recv(self, tensors: list[Tensor], peer: int, tag: int, /) -> Work: ...

    def abort(self) -> None: ...


class Meeting(Protocol):
    """A torch.distributed.TCPStore: where two processes find each other."""

    @property
    def port(self) -> int: ...


Groups = Callable[[Meeting, int], Group]
"""Makes a process's end of a group of two, of its rank. Raises RuntimeError."""


def nccl_group(meeting: Meeting, rank: int) -> Group:
    """Without torch's guards, which end a process whose peer stalls; ``wait`` is the host's, with a limit."""
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = STALL
    return cast(Group, dist.ProcessGroupNCCL(meeting, rank, 2, options))  # type: ignore[arg-type]


def listen() -> Meeting:
    """A peer can meet this process there, at its ``port``, for as long as it is referenced."""
    store: Meeting = TCPStore("127.0.0.1", 0, None, True, timeout=STALL, wait_for_workers=False)
    return store


def meet(host: str, port: int) -> Meeting:
    """Where a peer listens. Raises RuntimeError."""
    store: Meeting = TCPStore(host, port, None, False, timeout=STALL)
    return store


def num_slots(block_bytes: int) -> int:
    """Blocks in one half of a ring: the most that one message carries."""
    return max(1, RING_BYTES // 2 // block_bytes)


class Ring:
    """One end, of ``slots`` blocks per message at both. One call at a time; ``abort`` at any time, and twice.

    Making one raises DeviceLost, and RuntimeError where there is no memory for it.
    """

    def __init__(self, group: Group, peer: int, device: DeviceBlocks, slots: int, block_bytes: int) -> None:
        self._group = group
        self._peer = peer
        self._device = device
        self._slots = slots
        self._halves = device.landing(2 * slots * block_bytes).view(2, slots, block_bytes)
        self._is_over = threading.Event()

    @property
    def is_over(self) -> bool:
        return self._is_over.is_set()

    def send(self, blocks: Sequence[BlockId]) -> None:
        """Raises RingBroken, DeviceLost."""
        under_way: deque[Work] = deque()
        for turn, window in enumerate(self._windows(blocks)):
            if len(under_way) == 2:
                self._finish(under_way.popleft())
            half = self._halves[turn % 2, : len(window)]
            self._device.copy_out(window, half)
            under_way.append(self._start(self._group.send, half))
        while under_way:
            self._finish(under_way.popleft())

    def receive(self, blocks: Sequence[BlockId]) -> None:
        """Raises RingBroken, DeviceLost. Some of the blocks may hold what they should then, and others not."""
        under_way: deque[tuple[Work, Tensor, Sequence[BlockId]]] = deque()
        for turn, window in enumerate(self._windows(blocks)):
            if len(under_way) == 2:
                self._land(*under_way.popleft())
            half = self._halves[turn % 2, : len(window)]
            under_way.append((self._start(self._group.recv, half), half, window))
        while under_way:
            self._land(*under_way.popleft())

    def send_bytes(self, memory: Tensor) -> None:
        """Any bytes on the device. Raises RingBroken."""
        self._finish(self._start(self._group.send, memory))

    def receive_bytes(self, num_bytes: int) -> bytes:
        """Raises RingBroken, DeviceLost."""
        message = self._device.landing(num_bytes)
        self._finish(self._start(self._group.recv, message))
        with self._device.beside_steps():
            return message.cpu().numpy().tobytes()

    def abort(self) -> None:
        """What waits for the peer ends with RingBroken."""
        if not self._is_over.is_set():
            self._is_over.set()
            self._group.abort()

    def _windows(self, blocks: Sequence[BlockId]) -> list[Sequence[BlockId]]:
        return [blocks[start : start + self._slots] for start in range(0, len(blocks), self._slots)]

    def _start(self, transfer: Callable[[list[Tensor], int, int], Work], message: Tensor) -> Work:
        with self._device.beside_steps():
            return self._or_break(lambda: transfer([message], self._peer, 0))

    def _finish(self, work: Work) -> None:
        with self._device.beside_steps():
            self._or_break(lambda: work.wait(STALL))

    def _land(self, work: Work, half: Tensor, window: Sequence[BlockId]) -> None:
        self._finish(work)
        self._device.copy_in(half, range(len(window)), window)

    def _or_break(self, step: Callable[[], T]) -> T:
        if self.is_over:
            raise RingBroken("this communicator is over")
        try:
            return step()
        except RuntimeError as error:
            self.abort()
            raise RingBroken(str(error)) from error
