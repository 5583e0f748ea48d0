"""NIXL without its library: agents of one process, whose READs are copies that can be held back, or fail."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvtransfer.transports.nixl_landing import NixlBroken, NixlUnavailable, Region


@dataclass
class FakeAgent:
    """Shares memory, and reads what any other shares. ``is_held``: READs make no progress. ``fault``: they fail so.

    ``registered``: what may be written; ``met``, ``parted``: peers.
    """

    name: str = "agent"
    is_held: bool = False
    fault: str = ""
    part_s: float = 0.0
    shared: set[Region] = field(default_factory=set)
    registered: set[Region] = field(default_factory=set)
    met: list[str] = field(default_factory=list)
    parted: list[str] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)

    def share(self, memory: Region) -> bytes:
        if self.fault:
            raise NixlUnavailable(self.fault)
        self.shared.add(memory)
        return self.name.encode()

    def register(self, memory: Region) -> None:
        assert memory not in self.registered
        self.registered.add(memory)

    def unregister(self, memory: Region) -> None:
        self.registered.remove(memory)

    def meet(self, metadata: bytes) -> str:
        if not metadata.startswith(b"p"):
            raise NixlBroken("nobody is there")
        name = metadata.decode()
        if self.met.count(name) > self.parted.count(name):
            raise NixlBroken("another peer has its name")
        self.met.append(name)
        return name

    def part(self, peer: str) -> None:
        time.sleep(self.part_s)
        self.parted.append(peer)

    def read(self, peer: str, theirs: Sequence[Region], ours: Sequence[Region]) -> FakeReading:
        assert peer in self.met
        self.reads.append(len(theirs))
        return FakeReading(self, theirs, ours)

    @property
    def has_given_back(self) -> bool:
        return not self.registered and sorted(self.parted) == sorted(self.met)


@dataclass
class FakeReading:
    agent: FakeAgent
    theirs: Sequence[Region]
    ours: Sequence[Region]

    def is_done(self) -> bool:
        if self.agent.fault:
            raise NixlBroken(self.agent.fault)
        if self.agent.is_held:
            return False
        for source, target in zip(self.theirs, self.ours, strict=True):
            assert source.num_bytes == target.num_bytes
            assert self._is_registered(target), "a READ writes where it may"
            ctypes.memmove(target.address, source.address, source.num_bytes)
        return True

    def _is_registered(self, target: Region) -> bool:
        end = target.address + target.num_bytes
        return any(
            each.address <= target.address and end <= each.address + each.num_bytes for each in self.agent.registered
        )
