"""The waiting sequences in the order in which they will be admitted. Knows ranks; decides nothing."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from engine.sequence import Rank, Waiting
from proto.ids import RequestId


def _rank(waiting: Waiting) -> Rank:
    return waiting.rank


class WaitingQueue:
    """Sorted by rank, which is unique. Bounded by its user, so a list is quick enough."""

    def __init__(self) -> None:
        self._items: list[Waiting] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._items)

    @property
    def num_new(self) -> int:
        """How many wait for the first time, with nothing of their output known."""
        return sum(not waiting.is_urgent for waiting in self._items)

    @property
    def has_urgent(self) -> bool:
        return any(waiting.is_urgent for waiting in self._items)

    @property
    def num_tokens(self) -> int:
        return sum(len(waiting.track) for waiting in self._items)

    def add(self, waiting: Waiting) -> None:
        insort(self._items, waiting, key=_rank)

    def remove(self, waiting: Waiting) -> None:
        index = bisect_left(self._items, waiting.rank, key=_rank)
        assert self._items[index] is waiting
        del self._items[index]

    def of(self, request: RequestId) -> list[Waiting]:
        return [waiting for waiting in self._items if waiting.track.id == request]

    def check_integrity(self) -> None:
        ranks = [waiting.rank for waiting in self._items]
        assert ranks == sorted(set(ranks)), "the queue is sorted and ranks are unique"
