"""Which full blocks hold which tokens, so that equal prefixes are computed once.

Stands between its users and the block pool: whoever needs blocks allocates here, because taking a free block may
evict what it holds. A hash names at most one block; a second block with the same content is simply not cached.
Knows hashes and blocks; knows nothing of requests.

    block:  allocate ─▶ written by its owner ─▶ full: insert ─▶ release ─▶ free, still matched ─▶ allocate: evicted
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.block_pool import BlockPool
from proto.errors import LocalProtocolError
from proto.ids import BlockHash, BlockId
from proto.inventory import CacheChange, Cleared, Evicted, Stored


class PrefixCache:
    """The index of cached blocks over ``pool``. With ``is_enabled`` False nothing is inserted, so nothing matches."""

    def __init__(self, pool: BlockPool, *, is_enabled: bool = True) -> None:
        self.is_enabled = is_enabled
        self._pool = pool
        self._block_of: dict[BlockHash, BlockId] = {}
        self._hash_of: dict[BlockId, BlockHash] = {}
        # The net change since the last take_events: what is stored and evicted in between cancels out, so that an
        # inventory nobody asks for stays as small as the pool.
        self._was_cleared = False
        self._new: dict[BlockHash, None] = {}
        self._gone: dict[BlockHash, None] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, those with cached content included."""
        return self._pool.num_free

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    def num_refs(self, block: BlockId) -> int:
        return self._pool.num_refs(block)

    def num_without(self, refs: Mapping[BlockId, int]) -> int:
        """How many blocks would become free if these numbers of references were given back."""
        return self._pool.num_without(refs)

    def match(self, hashes: Sequence[BlockHash]) -> tuple[BlockId, ...]:
        """Blocks of the longest cached leading part of ``hashes``. Changes nothing: pin them to keep them."""
        blocks: list[BlockId] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return tuple(blocks)

    def allocate(self, num_blocks: int) -> list[BlockId]:
        """Takes free blocks, least recently used first; what they held is evicted. One reference each.

        Raises LocalProtocolError when fewer are free: callers decide by ``num_free`` first.
        """
        blocks = self._pool.allocate(num_blocks)
        self.forget(blocks)
        return blocks

    def cost_of_pinning(self, blocks: Sequence[BlockId]) -> int:
        """By how much pinning ``blocks`` lowers ``num_free``."""
        return sum(self._pool.num_refs(block) == 0 for block in blocks)

    def pin(self, blocks: Sequence[BlockId]) -> None:
        """One more reference to each block."""
        for block in blocks:
            self._pool.pin(block)

    def release(self, blocks: Sequence[BlockId]) -> None:
        """Gives back one reference to each block of one sequence, given in the sequence's order.

        Later blocks are queued first, so a prefix outlives its continuations; blocks without cached content are taken
        before all others.
        """
        for block in reversed(blocks):
            self._pool.unpin(block, reuse_first=block not in self._hash_of)

    def insert(self, block_hash: BlockHash, block: BlockId) -> bool:
        """Makes a full block matchable. It is immutable from here on. False if the content is cached already."""
        if self._pool.num_refs(block) == 0:
            raise LocalProtocolError(f"block {block} is inserted by nobody who holds it")
        if not self.is_enabled or block_hash in self._block_of:
            return False
        if block in self._hash_of:
            raise LocalProtocolError(f"block {block} is cached under another hash")
        self._block_of[block_hash] = block
        self._hash_of[block] = block_hash
        if block_hash in self._gone:
            del self._gone[block_hash]
        else:
            self._new[block_hash] = None
        return True

    def forget(self, blocks: Sequence[BlockId]) -> None:
        """These match no more, and nothing that continues them. Whoever uses them keeps them."""
        for block in blocks:
            block_hash = self._hash_of.pop(block, None)
            if block_hash is not None:
                del self._block_of[block_hash]
                self._note_evicted(block_hash)

    def clear(self) -> None:
        """Forgets all content. Blocks in use stay with their users, but match no more."""
        self._block_of.clear()
        self._hash_of.clear()
        self._new.clear()
        self._gone.clear()
        self._was_cleared = True

    def hashes(self) -> list[BlockHash]:
        """Everything that can be matched now, oldest insertion first."""
        return list(self._block_of)

    def take_events(self) -> list[CacheChange]:
        """The net change since the last call, to be applied in order."""
        events: list[CacheChange] = []
        if self._was_cleared:
            events.append(Cleared())
        if self._gone:
            events.append(Evicted(tuple(self._gone)))
        if self._new:
            events.append(Stored(tuple(self._new)))
        self._was_cleared = False
        self._new.clear()
        self._gone.clear()
        return events

    def check_integrity(self, references: Sequence[BlockId] | None = None) -> None:
        """Recomputes everything from scratch; see ``BlockPool.check_integrity``."""
        self._pool.check_integrity(references)
        assert len(self._block_of) == len(self._hash_of)
        assert all(self._hash_of[block] == block_hash for block_hash, block in self._block_of.items())
        assert self.is_enabled or not self._block_of
        assert all(block_hash in self._block_of for block_hash in self._new)
        assert not any(block_hash in self._block_of for block_hash in self._gone)

    def _note_evicted(self, block_hash: BlockHash) -> None:
        if block_hash in self._new:
            del self._new[block_hash]
        else:
            self._gone[block_hash] = None
