"""Matching, eviction and the inventory's events, against a model that remembers what each block was given."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.block_pool import BlockPool
from engine.prefix_cache import PrefixCache
from proto.errors import LocalProtocolError
from proto.hashing import BlockHasher
from proto.ids import BlockHash, BlockId
from proto.inventory import Cleared, Evicted, Stored


def chain(length: int, start: int = 0) -> list[BlockHash]:
    return BlockHasher("test", 1).full_blocks(range(start, start + length))


def cached(cache: PrefixCache, hashes: list[BlockHash]) -> list[BlockId]:
    """Blocks that hold ``hashes``, with a reference each."""
    blocks = cache.allocate(len(hashes))
    for block_hash, block in zip(hashes, blocks, strict=True):
        assert cache.insert(block_hash, block)
    return blocks


def test_the_longest_leading_part_matches() -> None:
    cache = PrefixCache(BlockPool(8))
    hashes = chain(4)
    blocks = cached(cache, hashes[:3])
    assert cache.match(hashes) == tuple(blocks)
    assert cache.match(hashes[:2]) == tuple(blocks[:2])
    assert cache.match(hashes[3:]) == ()
    assert cache.match(chain(4, start=1)) == ()


def test_released_blocks_match_until_they_are_taken_tail_first() -> None:
    cache = PrefixCache(BlockPool(4))
    hashes = chain(3)
    blocks = cached(cache, hashes)
    cache.release(blocks)
    assert cache.num_free == 4
    for survivors in (3, 2, 1, 0):
        cache.allocate(1)
        assert len(cache.match(hashes)) == survivors
    cache.check_integrity()


def test_blocks_without_content_are_taken_before_cached_ones() -> None:
    cache = PrefixCache(BlockPool(4))
    hashes = chain(2)
    blocks = cached(cache, hashes)
    cache.release([*blocks, *cache.allocate(2)])
    cache.allocate(2)
    assert cache.match(hashes) == tuple(blocks)


def test_a_match_that_is_pinned_survives() -> None:
    cache = PrefixCache(BlockPool(4))
    hashes = chain(2)
    cache.release(cached(cache, hashes))
    matched = cache.match(hashes)
    assert cache.cost_of_pinning(matched) == 2
    cache.pin(matched)
    assert cache.cost_of_pinning(matched) == 0
    cache.allocate(2)
    assert cache.num_free == 0
    assert cache.match(hashes) == matched


def test_equal_content_is_cached_once() -> None:
    cache = PrefixCache(BlockPool(4))
    [first] = cached(cache, chain(1))
    [second] = cache.allocate(1)
    assert not cache.insert(chain(1)[0], second)
    cache.release([first])
    assert cache.match(chain(1)) == (first,)
    cache.pin([first])
    with pytest.raises(LocalProtocolError, match="another hash"):
        cache.insert(chain(1, start=5)[0], first)
    with pytest.raises(LocalProtocolError, match="nobody"):
        cache.insert(chain(1, start=6)[0], BlockId(3))


def test_disabled_it_only_allocates() -> None:
    cache = PrefixCache(BlockPool(2), is_enabled=False)
    [block] = cache.allocate(1)
    assert not cache.insert(chain(1)[0], block)
    assert cache.match(chain(1)) == ()
    cache.release([block])
    assert cache.take_events() == []
    assert cache.num_free == 2


def test_events_tell_the_net_change() -> None:
    cache = PrefixCache(BlockPool(2))
    one, two = chain(2)
    cache.release(cached(cache, [one]))
    assert cache.take_events() == [Stored((one,))]
    assert cache.take_events() == []
    cache.release(cached(cache, [two]))
    cache.release(cache.allocate(2))
    assert cache.take_events() == [Evicted((one,))], "two came and went unseen"
    cache.release(cached(cache, [one]))
    cache.take_events()
    cache.release(cache.allocate(2))
    cache.release(cached(cache, [one]))
    assert cache.take_events() == [], "one went and came back unseen"
    cache.clear()
    cached(cache, [two])
    assert cache.take_events() == [Cleared(), Stored((two,))]
    assert cache.hashes() == [two]


class CacheMachine(RuleBasedStateMachine):
    """Sequences are paths in a small tree of prefixes, so that they share blocks."""

    SIZE = 8
    paths = st.lists(st.integers(0, 1), min_size=1, max_size=4)

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(BlockPool(self.SIZE))
        self.hasher = BlockHasher("test", 1)
        self.content: dict[int, BlockHash | None] = {}
        self.sequences: list[list[BlockId]] = []
        self.inventory: set[BlockHash] = set()

    @rule(path=paths, num_filled=st.integers(0, 4))
    def start(self, path: list[int], num_filled: int) -> None:
        hashes = self.hasher.full_blocks(path)
        matched = self.cache.match(hashes)
        for block_hash, block in zip(hashes, matched, strict=False):
            assert self.content[block] == block_hash, "a match leads to what was written"
        num_new = len(hashes) - len(matched)
        if num_new + self.cache.cost_of_pinning(matched) > self.cache.num_free:
            return
        self.cache.pin(matched)
        fresh = self.cache.allocate(num_new)
        for block in fresh:
            assert not any(block in sequence for sequence in self.sequences), "nobody else has it"
            self.content[block] = None
        for block_hash, block in list(zip(hashes[len(matched) :], fresh, strict=True))[:num_filled]:
            self.content[block] = block_hash
            self.cache.insert(block_hash, block)
        self.sequences.append([*matched, *fresh])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.sequences) - 1))
        self.cache.release(self.sequences.pop(index))

    @rule()
    def clear(self) -> None:
        self.cache.clear()

    @rule()
    def take_events(self) -> None:
        for event in self.cache.take_events():
            match event:
                case Cleared():
                    self.inventory.clear()
                case Evicted(hashes):
                    assert self.inventory.issuperset(hashes)
                    self.inventory -= set(hashes)
                case Stored(hashes):
                    assert self.inventory.isdisjoint(hashes)
                    self.inventory |= set(hashes)
        assert self.inventory == set(self.cache.hashes())

    @invariant()
    def is_sound(self) -> None:
        self.cache.check_integrity([block for sequence in self.sequences for block in sequence])


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
