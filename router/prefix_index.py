"""Which worker holds which prefix: every worker's inventory of block hashes, inverted.

Fed by the ledger's events (stored, evicted, cleared, snapshot), one set per worker epoch. A hash stands for its block
and for everything before it, so the blocks of a prompt that a worker holds and can use are the leading ones. Knows
hashes and epochs; knows nothing of tokens, Redis, or whether a worker is alive. A wrong entry costs time, never
correctness: the workers decide what they really hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from proto.ids import BlockHash, Epoch

MAX_HASHES_PER_WORKER = 4_000_000
_NOBODY: frozenset[Epoch] = frozenset()


class PrefixIndex:
    """hash → holders and epoch → hashes. Bounded: a worker's entries beyond ``max_hashes`` are left out and counted."""

    def __init__(self, max_hashes: int = MAX_HASHES_PER_WORKER) -> None:
        self._max_hashes = max_hashes
        self._holders: dict[BlockHash, frozenset[Epoch]] = {}
        self._hashes: dict[Epoch, set[BlockHash]] = {}
        self._shared: dict[frozenset[Epoch], frozenset[Epoch]] = {}  # equal holder sets are one object
        self.num_left_out = 0

    def stored(self, epoch: Epoch, hashes: Iterable[BlockHash]) -> None:
        """``epoch`` now holds ``hashes`` too. Idempotent."""
        mine = self._hashes.setdefault(epoch, set())
        for block in hashes:
            if block in mine:
                continue
            if len(mine) >= self._max_hashes:
                self.num_left_out += 1
                continue
            mine.add(block)
            self._set_holders(block, self._holders.get(block, _NOBODY) | {epoch})

    def evicted(self, epoch: Epoch, hashes: Iterable[BlockHash]) -> None:
        """``epoch`` no longer holds ``hashes``. Unknown ones are ignored."""
        mine = self._hashes.get(epoch)
        for block in hashes:
            if mine and block in mine:
                mine.discard(block)
                self._set_holders(block, self._holders[block] - {epoch})

    def cleared(self, epoch: Epoch) -> None:
        """``epoch`` holds nothing now."""
        self.evicted(epoch, list(self._hashes.get(epoch, ())))

    def snapshot(self, epoch: Epoch, hashes: Iterable[BlockHash]) -> None:
        """``epoch`` holds exactly ``hashes``: what a gap in its events is answered with."""
        current = set(hashes)
        self.evicted(epoch, self._hashes.get(epoch, set()) - current)
        self.stored(epoch, current)

    def drop(self, epoch: Epoch) -> None:
        """Forgets ``epoch`` and all it held. Idempotent."""
        self.cleared(epoch)
        self._hashes.pop(epoch, None)
        self._shared.clear()

    def match(self, hashes: Sequence[BlockHash]) -> dict[Epoch, int]:
        """Per epoch that holds ``hashes[0]``, how many leading blocks it holds; the others are absent (none)."""
        leading: dict[Epoch, int] = {}
        still: frozenset[Epoch] = _NOBODY
        for depth, block in enumerate(hashes):
            holders = self._holders.get(block, _NOBODY)
            still = still & holders if depth else holders
            if not still:
                break
            for epoch in still:
                leading[epoch] = depth + 1
        return leading

    def num_hashes(self, epoch: Epoch) -> int:
        return len(self._hashes.get(epoch, ()))

    def check_integrity(self) -> None:
        """Recomputes one direction from the other; raises AssertionError where they differ."""
        inverted: dict[BlockHash, set[Epoch]] = {}
        for epoch, hashes in self._hashes.items():
            assert len(hashes) <= self._max_hashes, f"{epoch} has more entries than its bound"
            for block in hashes:
                inverted.setdefault(block, set()).add(epoch)
        assert inverted == self._holders, "the two directions of the prefix index differ"

    def _set_holders(self, block: BlockHash, holders: frozenset[Epoch]) -> None:
        if holders:
            self._holders[block] = self._shared.setdefault(holders, holders)
        else:
            self._holders.pop(block, None)
