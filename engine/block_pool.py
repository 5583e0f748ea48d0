"""Which blocks of the KV memory are in use, and in which order the others are taken.

    in use:  num_refs > 0, in no queue
    free:    num_refs = 0, in the free queue     head ─▶ [taken next] ... [taken last] ◀─ tail

Knows reference counts and an order; knows nothing of tokens, hashes or what a block holds. The prefix cache keeps
free blocks whose content may still be wanted near the tail, so that they live longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from proto.errors import LocalProtocolError
from proto.ids import BlockId


class BlockPool:
    """Reference counts and the free queue of ``num_blocks`` blocks. Every operation is O(1) per block.

    The queue is a doubly linked list in two arrays, because a block in its middle must be taken out when a prefix match
    revives it; index ``num_blocks`` is the sentinel that is both before the head and after the tail.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool has at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self._refs = [0] * num_blocks
        self._next = [*range(1, num_blocks + 1), 0]
        self._prev = [num_blocks, *range(num_blocks)]

    def num_refs(self, block: BlockId) -> int:
        return self._refs[block]

    def num_without(self, refs: Mapping[BlockId, int]) -> int:
        """How many blocks would become free if these numbers of references were given back."""
        held = self._refs
        return sum(held[block] == num_refs for block, num_refs in refs.items())

    def allocate(self, num_blocks: int) -> list[BlockId]:
        """Takes blocks from the head of the queue, each with one reference. The caller has looked at ``num_free``."""
        if num_blocks > self.num_free:
            raise LocalProtocolError(f"{num_blocks} blocks asked for, {self.num_free} free")
        sentinel = self.num_blocks
        taken: list[BlockId] = []
        for _ in range(num_blocks):
            block = BlockId(self._next[sentinel])
            self._unlink(block)
            self._refs[block] = 1
            taken.append(block)
        return taken

    def pin(self, block: BlockId) -> None:
        """One more reference; a free block leaves the queue with its content."""
        if self._refs[block] == 0:
            self._unlink(block)
        self._refs[block] += 1

    def unpin(self, block: BlockId, *, reuse_first: bool = False) -> None:
        """One reference less; at none the block is free, at the queue's tail or, with ``reuse_first``, at its head."""
        if self._refs[block] == 0:
            raise LocalProtocolError(f"block {block} is not in use")
        self._refs[block] -= 1
        if self._refs[block] == 0:
            sentinel = self.num_blocks
            self._link_after(block, sentinel if reuse_first else self._prev[sentinel])

    def free_blocks(self) -> list[BlockId]:
        """The free queue, head first."""
        blocks: list[BlockId] = []
        block = self._next[self.num_blocks]
        while block != self.num_blocks:
            blocks.append(BlockId(block))
            block = self._next[block]
            assert len(blocks) <= self.num_blocks, "the free queue has a cycle"
        return blocks

    def check_integrity(self, references: Iterable[BlockId] | None = None) -> None:
        """Recomputes everything from scratch. ``references``: every reference that holders have, with repetition."""
        queue = self.free_blocks()
        assert len(queue) == len(set(queue)) == self.num_free, "the free queue and its count differ"
        assert set(queue) == {b for b, refs in enumerate(self._refs) if refs == 0}, "free means no references"
        assert all(refs >= 0 for refs in self._refs)
        for before, after in zip([self.num_blocks, *queue], [*queue, self.num_blocks], strict=True):
            assert self._next[before] == after, "links forward"
            assert self._prev[after] == before, "links backward"
        if references is not None:
            counted = [0] * self.num_blocks
            for block in references:
                counted[block] += 1
            assert counted == self._refs, "reference counts and holders differ"

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before] = after
        self._prev[after] = before
        self.num_free -= 1

    def _link_after(self, block: int, before: int) -> None:
        after = self._next[before]
        self._next[before] = self._prev[after] = block
        self._prev[block], self._next[block] = before, after
        self.num_free += 1
