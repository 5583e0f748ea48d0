"""A peer's memory as it is mapped here: once per incarnation of the peer, shared by its hand-offs.

    open ──keep──▶ cached ──the process ends, or close()──▶ retired ──last user gone──▶ released
                                (nobody can tell when it ends: retired as soon as nobody uses it)

A mapping that stayed behind would keep a dead worker's whole memory. Knows processes and users; how memory is mapped
and unmapped is its caller's. For one event loop.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Generic, TypeVar

from proto.ids import Epoch

M = TypeVar("M")


class Mapping(Generic[M]):
    """``memory`` stays mapped until it is retired and ``num_users`` is 0."""

    def __init__(self, memory: M, release: Callable[[M], None]) -> None:
        self.memory = memory
        self._release = release
        self._num_users = 0
        self._is_retired = False
        self._on_idle: Callable[[], None] | None = None
        self._process: int | None = None

    def take(self) -> None:
        self._num_users += 1

    def give_back(self) -> None:
        self._num_users -= 1
        self._settle()

    def watch(self, pid: int | None, on_end: Callable[[], None]) -> None:
        """Calls ``on_end`` when the process ends; where it cannot be told (no pid), when nobody uses the memory."""
        try:
            self._process = None if pid is None else os.pidfd_open(pid)
        except (OSError, AttributeError):
            self._process = None
        if self._process is None:
            self._on_idle = on_end
        else:
            asyncio.get_running_loop().add_reader(self._process, on_end)

    def retire(self) -> None:
        self._is_retired = True
        if self._process is not None:
            asyncio.get_running_loop().remove_reader(self._process)
            os.close(self._process)
            self._process = None
        self._settle()

    def _settle(self) -> None:
        if self._num_users:
            return
        if self._is_retired:
            self._release(self.memory)
        elif self._on_idle is not None:
            self._on_idle()


class Mappings(Generic[M]):
    """Those of one reader, by the peer's epoch."""

    def __init__(self, release: Callable[[M], None]) -> None:
        self._release = release
        self._by_epoch: dict[Epoch, Mapping[M]] = {}

    def __len__(self) -> int:
        return len(self._by_epoch)

    def __getitem__(self, epoch: Epoch) -> Mapping[M]:
        return self._by_epoch[epoch]

    def get(self, epoch: Epoch) -> Mapping[M] | None:
        return self._by_epoch.get(epoch)

    def keep(self, epoch: Epoch, memory: M, pid: int | None) -> Mapping[M]:
        """``pid``: the process whose memory it is, where that number means the same process here."""
        mapping = self._by_epoch[epoch] = Mapping(memory, self._release)
        mapping.watch(pid, lambda: self.forget(epoch))
        return mapping

    def forget(self, epoch: Epoch) -> None:
        """That incarnation is over. Its memory goes with the last user. May be called twice."""
        mapping = self._by_epoch.pop(epoch, None)
        if mapping is not None:
            mapping.retire()

    def close(self) -> None:
        for epoch in list(self._by_epoch):
            self.forget(epoch)
