"""One peer's memory as NIXL reads it here, and where its READs land.

    begin ──▶ met ──READ──▶ landed ──▶ copied into blocks, by the caller
                      └─ failed, or late ──▶ end: once the library says that it is over, all is given back

A READ cannot be taken back: over TCP one from a P that was stopped still arrived when P woke up, its handle released
and P's agent removed. So READs land in memory of the transport's own, and a READ that is late keeps that memory, not
the blocks. Knows the library as an ``Agent``; knows nothing of hand-offs. What it does, it does in its caller's thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvtransfer.transport import DeviceBlocks

LANDING_BYTES = 32 << 20
"""Where one peer's READs land: the most that one of them brings."""
MAX_METADATA_BYTES = 64 << 10
MAX_NONCE_BYTES = 64
PAUSE_S = 0.0005
"""Between two looks at a READ. A look also moves it on."""
LATE_PAUSE_S = 0.1

DRAM = "DRAM"
VRAM = "VRAM"


class NixlUnavailable(Exception):
    """The library does not work here; the message says why."""


class NixlBroken(Exception):
    """What was wanted of a peer has failed; the message says why."""


@dataclass(frozen=True, slots=True)
class Region:
    """Memory of one process: of its CPU (DRAM), or of its GPU number ``device`` (VRAM)."""

    address: int
    num_bytes: int
    kind: str
    device: int

    def piece(self, offset: int, num_bytes: int) -> Region:
        return Region(self.address + offset, num_bytes, self.kind, self.device)


class Reading(Protocol):
    """One READ. Until it is over it may write at any time, whatever becomes of its peer."""

    def is_done(self) -> bool:
        """Moves it on, and says whether all has arrived. Raises NixlBroken: it has failed, and is over."""


class Agent(Protocol):
    """What this transport needs of NIXL: see ``NixlAgent``. Called from any thread."""

    def share(self, memory: Region) -> bytes:
        """Lets other agents read ``memory``, which must live as long as this process; what they need to know of us.

        May be called again. Raises NixlUnavailable.
        """

    def register(self, memory: Region) -> None:
        """For READs to land in. Raises NixlBroken."""

    def unregister(self, memory: Region) -> None:
        """No READ into it is under way."""

    def meet(self, metadata: bytes) -> str:
        """The name of the agent that ``share`` described so, from which we can read now. Raises NixlBroken."""

    def part(self, peer: str) -> None:
        """No READ from it is under way."""

    def read(self, peer: str, theirs: Sequence[Region], ours: Sequence[Region]) -> Reading:
        """Each of ``theirs`` into the one of ``ours`` beside it, from the first look on. Raises NixlBroken."""


@dataclass(frozen=True, slots=True)
class NixlOffer:
    """How P's agent is met, where its KV memory lies, and the nonce that is the memory's last bytes."""

    metadata: bytes
    address: int
    num_bytes: int
    kind: str
    device: int
    nonce: bytes

    @property
    def memory(self) -> Region:
        return Region(self.address, self.num_bytes, self.kind, self.device)


def region_of(memory: Tensor) -> Region:
    """Contiguous memory, as NIXL names it."""
    kind = VRAM if memory.is_cuda else DRAM
    return Region(memory.data_ptr(), memory.numel() * memory.element_size(), kind, memory.device.index or 0)


class Connection:
    """A peer's agent, and where READs from it land: ``slots`` blocks. For threads, one call at a time."""

    def __init__(
        self, agent: Agent, offer: NixlOffer, device: DeviceBlocks | None, block_bytes: int, stall_s: float
    ) -> None:
        self.slots = max(1, LANDING_BYTES // block_bytes)
        self._agent = agent
        self._offer = offer
        self._device = device
        self._block_bytes = block_bytes
        self._stall_s = stall_s
        self._memory: Tensor | None = None
        self._peer: str | None = None
        self._reading: Reading | None = None
        self._in_use = threading.Lock()
        self._over = threading.Event()

    def begin(self) -> None:
        """Raises NixlBroken, also where the nonce is not the one that was offered; RuntimeError without memory;
        DeviceLost."""
        with self._in_use:
            size = max(self.slots * self._block_bytes, MAX_NONCE_BYTES)
            device = self._device
            memory = torch.empty(size, dtype=torch.uint8) if device is None else device.landing(size)
            self._agent.register(region_of(memory))
            self._memory = memory
            self._peer = self._agent.meet(self._offer.metadata)
            length = len(self._offer.nonce)
            self._read([(self._offer.num_bytes - length, length)])
            with nullcontext() if device is None else device.beside_steps():
                nonce = memory[:length].cpu().numpy().tobytes()
            if nonce != self._offer.nonce:
                raise NixlBroken("it is another process than the one that made the offer")

    @property
    def landed(self) -> Tensor:
        """``[slots, block_bytes]``: what ``fetch`` brought, in its first rows."""
        assert self._memory is not None, "a connection that has begun"
        return self._memory[: self.slots * self._block_bytes].view(self.slots, self._block_bytes)

    def fetch(self, theirs: Sequence[int]) -> None:
        """P's blocks of these numbers, ``slots`` of them at most. Raises NixlBroken."""
        with self._in_use:
            self._read([(block * self._block_bytes, self._block_bytes) for block in theirs])

    def end(self) -> None:
        """Returns when nothing is written here any more, however long that takes, and all is given back."""
        with self._in_use:
            with suppress(NixlBroken):
                while not self._has_settled():
                    time.sleep(LATE_PAUSE_S)
            if self._peer is not None:
                self._agent.part(self._peer)
            if self._memory is not None:
                self._agent.unregister(region_of(self._memory))
                self._memory = None
        self._over.set()

    @property
    def is_over(self) -> bool:
        """Whether ``end`` has returned."""
        return self._over.is_set()

    def wait(self, timeout_s: float) -> bool:
        """The same, once that is so, or after ``timeout_s``."""
        return self._over.wait(timeout_s)

    def _read(self, pieces: Sequence[tuple[int, int]]) -> None:
        """Offsets and sizes in P's memory, which land one after the other."""
        if self._memory is None or self._peer is None or self._reading is not None:
            raise NixlBroken("the connection is over")
        landing, theirs, ours, end = region_of(self._memory), [], [], 0
        for offset, num_bytes in pieces:
            theirs.append(self._offer.memory.piece(offset, num_bytes))
            ours.append(landing.piece(end, num_bytes))
            end += num_bytes
        self._reading = self._agent.read(self._peer, theirs, ours)
        deadline = time.monotonic() + self._stall_s
        while not self._has_settled():
            if time.monotonic() > deadline:
                raise NixlBroken(f"no answer for {self._stall_s:g} s")
            time.sleep(PAUSE_S)

    def _has_settled(self) -> bool:
        """Whether no READ is under way. Raises NixlBroken: none is any more, the last one has failed."""
        try:
            if self._reading is not None and not self._reading.is_done():
                return False
        except NixlBroken:
            self._reading = None
            raise
        self._reading = None
        return True
