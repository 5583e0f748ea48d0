"""Where each block of one incoming hand-off is.

    announced ──frame──▶ waiting ──take──▶ copying ──placed, right──▶ verified
                            ▲                 └──placed, damaged──▶ announced again, up to MAX_NACKS times

A block is copied by one copy at a time, and never again once it is verified. Knows frames; knows no messages' order.
"""

from __future__ import annotations

import enum
from collections import Counter

from proto.handoff import Frame

MAX_NACKS = 2
"""A block that is damaged more often than this is not fetched again: D computes the prompt itself."""


class Added(enum.Enum):
    NEW = enum.auto()
    UNDER_WAY = enum.auto()
    VERIFIED = enum.auto()


class Placed(enum.Enum):
    RIGHT = enum.auto()
    DAMAGED = enum.auto()
    HOPELESS = enum.auto()


class Arrivals:
    def __init__(self) -> None:
        self.num_verified = 0
        """Leading blocks that are right, the ones that were present included."""
        self._waiting: dict[int, Frame] = {}
        self._copying: set[int] = set()
        self._verified: set[int] = set()
        self._nacks: Counter[int] = Counter()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_copying(self) -> bool:
        return bool(self._copying)

    def begin(self, num_present: int) -> None:
        """The first ``num_present`` blocks are here already."""
        self.num_verified = num_present

    def add(self, frame: Frame) -> Added:
        """A block's bytes are here. They are taken where they are NEW, and where the block stood is said otherwise."""
        if frame.index in self._verified:
            return Added.VERIFIED
        if frame.index in self._copying or frame.index in self._waiting:
            return Added.UNDER_WAY
        self._waiting[frame.index] = frame
        return Added.NEW

    def take(self, limit: int) -> list[Frame]:
        """Up to ``limit`` frames to copy and verify; each ends with ``placed``."""
        indices = list(self._waiting)[:limit]
        self._copying.update(indices)
        return [self._waiting.pop(index) for index in indices]

    def placed(self, index: int, is_right: bool) -> Placed:
        self._copying.discard(index)
        if is_right:
            self._verified.add(index)
            while self.num_verified in self._verified:
                self.num_verified += 1
            return Placed.RIGHT
        if self._nacks[index] == MAX_NACKS:
            return Placed.HOPELESS
        self._nacks[index] += 1
        return Placed.DAMAGED

    def abandon(self, index: int) -> None:
        """A copy has ended that nobody waits for any more."""
        self._copying.discard(index)

    def drop_waiting(self) -> None:
        self._waiting.clear()
