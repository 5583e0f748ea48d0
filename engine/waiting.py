"""The waiting sequences in the order in which they will be admitted. Knows ranks; decides nothing."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from engine.sequence import Rank, Waiting
from proto.ids import RequestId


def _rank(waiting: Waiting) -> Rank:
    return waiting.rank


class WaitingQueue:
    """Sorted by rank, which is unique. ``num_new`` of them wait for the first time, with nothing of their output known;
    ``num_tokens`` is the sum of their lengths. A waiting track does not grow, so both are kept as it comes and goes."""

    def __init__(self) -> None:
        self.num_new = 0
        self.num_tokens = 0
        self._items: list[Waiting] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._items)

    @property
    def has_urgent(self) -> bool:
        return any(waiting.is_urgent for waiting in self._items)

    def add(self, waiting: Waiting) -> None:
        insort(self._items, waiting, key=_rank)
        self.num_new += not waiting.is_urgent
        self.num_tokens += len(waiting.track)

    def remove(self, waiting: Waiting) -> None:
        index = bisect_left(self._items, waiting.rank, key=_rank)
        assert self._items[index] is waiting
        del self._items[index]
        self.num_new -= not waiting.is_urgent
        self.num_tokens -= len(waiting.track)

    def of(self, request: RequestId) -> list[Waiting]:
        return [waiting for waiting in self._items if waiting.track.id == request]

    def check_integrity(self) -> None:
        ranks = [waiting.rank for waiting in self._items]
        assert ranks == sorted(set(ranks)), "the queue is sorted and ranks are unique"
        assert self.num_new == sum(not waiting.is_urgent for waiting in self._items)
        assert self.num_tokens == sum(len(waiting.track) for waiting in self._items)
