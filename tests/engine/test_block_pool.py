"""Reference counts and the free queue, against a model that is a plain list."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.block_pool import BlockPool
from proto.errors import LocalProtocolError
from proto.ids import BlockId


def test_blocks_are_taken_from_the_head_and_come_back_at_the_tail() -> None:
    pool = BlockPool(4)
    first = pool.allocate(3)
    assert first == [0, 1, 2]
    pool.unpin(first[1])
    pool.unpin(first[0])
    assert pool.free_blocks() == [3, 1, 0]
    pool.unpin(first[2], reuse_first=True)
    assert pool.free_blocks() == [2, 3, 1, 0]
    pool.check_integrity([])


def test_a_free_block_in_the_middle_can_be_revived() -> None:
    pool = BlockPool(4)
    pool.pin(BlockId(2))
    assert pool.free_blocks() == [0, 1, 3]
    pool.pin(BlockId(2))
    assert pool.num_refs(BlockId(2)) == 2
    pool.unpin(BlockId(2))
    assert pool.num_free == 3
    pool.unpin(BlockId(2))
    assert pool.free_blocks() == [0, 1, 3, 2]


def test_what_cannot_be_is_our_own_fault() -> None:
    pool = BlockPool(2)
    with pytest.raises(LocalProtocolError, match="3 blocks asked for, 2 free"):
        pool.allocate(3)
    with pytest.raises(LocalProtocolError, match="not in use"):
        pool.unpin(BlockId(1))
    assert pool.num_free == 2
    with pytest.raises(ValueError):
        BlockPool(0)


def test_a_wrong_count_is_found() -> None:
    pool = BlockPool(3)
    [block] = pool.allocate(1)
    pool.check_integrity([block])
    for wrong in ([], [block, block], [BlockId(2)]):
        with pytest.raises(AssertionError, match="holders"):
            pool.check_integrity(wrong)


class PoolMachine(RuleBasedStateMachine):
    SIZE = 6

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.SIZE)
        self.queue = list(range(self.SIZE))
        self.references: list[int] = []

    @rule(count=st.integers(0, SIZE))
    def allocate(self, count: int) -> None:
        if count > len(self.queue):
            with pytest.raises(LocalProtocolError):
                self.pool.allocate(count)
            return
        taken = self.pool.allocate(count)
        assert taken == self.queue[:count]
        del self.queue[:count]
        self.references += taken

    @rule(block=st.integers(0, SIZE - 1))
    def pin(self, block: int) -> None:
        self.pool.pin(BlockId(block))
        if block in self.queue:
            self.queue.remove(block)
        self.references.append(block)

    @precondition(lambda self: self.references)
    @rule(data=st.data(), reuse_first=st.booleans())
    def unpin(self, data: st.DataObject, reuse_first: bool) -> None:
        block = data.draw(st.sampled_from(self.references))
        self.references.remove(block)
        self.pool.unpin(BlockId(block), reuse_first=reuse_first)
        if block not in self.references:
            self.queue.insert(0 if reuse_first else len(self.queue), block)

    @invariant()
    def agrees_with_the_model(self) -> None:
        assert self.pool.free_blocks() == self.queue
        self.pool.check_integrity([BlockId(block) for block in self.references])


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
