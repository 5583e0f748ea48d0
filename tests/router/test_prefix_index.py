"""The inverted inventory: leading matches, and both directions always agree."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from proto.hashing import BlockHasher
from proto.ids import BlockHash, Epoch
from router.prefix_index import PrefixIndex

CHAIN = BlockHasher("test", 4).full_blocks(range(40))
A, B, C = Epoch("a"), Epoch("b"), Epoch("c")


def test_only_leading_blocks_count() -> None:
    index = PrefixIndex()
    index.stored(A, CHAIN[:5])
    index.stored(B, [*CHAIN[:2], *CHAIN[3:]])
    index.stored(C, CHAIN[1:])
    assert index.match(CHAIN) == {A: 5, B: 2}
    assert index.match(CHAIN[:3]) == {A: 3, B: 2}
    assert index.match([]) == {}


def test_a_block_that_comes_back_closes_the_gap() -> None:
    index = PrefixIndex()
    index.stored(A, CHAIN)
    index.evicted(A, CHAIN[:1])
    assert index.match(CHAIN) == {}
    index.stored(A, CHAIN[:1])
    assert index.match(CHAIN) == {A: len(CHAIN)}


def test_snapshot_replaces_and_drop_forgets() -> None:
    index = PrefixIndex()
    index.stored(A, CHAIN)
    index.stored(B, CHAIN)
    index.snapshot(A, CHAIN[:3])
    assert index.match(CHAIN) == {A: 3, B: 10}
    index.drop(B)
    index.drop(B)
    assert index.match(CHAIN) == {A: 3}
    assert (index.num_hashes(A), index.num_hashes(B)) == (3, 0)
    index.cleared(A)
    assert index.match(CHAIN) == {}
    index.check_integrity()


def test_one_workers_entries_are_bounded() -> None:
    index = PrefixIndex(max_hashes=4)
    index.stored(A, CHAIN)
    assert index.num_hashes(A) == 4
    assert index.num_left_out == 6
    index.stored(A, CHAIN[:4])
    assert index.num_left_out == 6
    index.check_integrity()


@given(st.lists(st.tuples(st.sampled_from([A, B, C]), st.sets(st.sampled_from(CHAIN)))))
def test_match_is_what_counting_each_worker_gives(inventories: list[tuple[Epoch, set[BlockHash]]]) -> None:
    index = PrefixIndex()
    held: dict[Epoch, set[BlockHash]] = {}
    for epoch, hashes in inventories:
        index.stored(epoch, hashes)
        held.setdefault(epoch, set()).update(hashes)
    expected = {}
    for epoch, hashes in held.items():
        leading = next((at for at, block in enumerate(CHAIN) if block not in hashes), len(CHAIN))
        if leading:
            expected[epoch] = leading
    assert index.match(CHAIN) == expected


class Inventories(RuleBasedStateMachine):
    """Events of three workers in any order, against plain sets."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.held: dict[Epoch, set[BlockHash]] = {A: set(), B: set(), C: set()}

    @rule(epoch=st.sampled_from([A, B, C]), hashes=st.sets(st.sampled_from(CHAIN)))
    def store(self, epoch: Epoch, hashes: set[BlockHash]) -> None:
        self.index.stored(epoch, hashes)
        self.held[epoch] |= hashes

    @rule(epoch=st.sampled_from([A, B, C]), hashes=st.sets(st.sampled_from(CHAIN)))
    def evict(self, epoch: Epoch, hashes: set[BlockHash]) -> None:
        self.index.evicted(epoch, hashes)
        self.held[epoch] -= hashes

    @rule(epoch=st.sampled_from([A, B, C]), hashes=st.sets(st.sampled_from(CHAIN)))
    def snapshot(self, epoch: Epoch, hashes: set[BlockHash]) -> None:
        self.index.snapshot(epoch, hashes)
        self.held[epoch] = set(hashes)

    @rule(epoch=st.sampled_from([A, B, C]))
    def drop(self, epoch: Epoch) -> None:
        self.index.drop(epoch)
        self.held[epoch] = set()

    @invariant()
    def agrees(self) -> None:
        self.index.check_integrity()
        assert {epoch: self.index.num_hashes(epoch) for epoch in self.held} == {
            epoch: len(hashes) for epoch, hashes in self.held.items()
        }


TestInventories = Inventories.TestCase
