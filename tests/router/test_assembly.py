"""Tokens in order, once each."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.errors import RemoteProtocolError
from proto.ids import RequestId
from proto.request import FinishReason, TokenOut
from router.assembly import MAX_HELD_BACK, TokenAssembly
from tests.support.fleet import token

R = RequestId("r.1")


def positions(outs: list[TokenOut]) -> list[int]:
    return [out.position for out in outs]


@given(st.permutations(list(range(8))), st.lists(st.integers(0, 7), max_size=10))
def test_any_order_and_any_repeats_give_one_sequence(order: list[int], repeats: list[int]) -> None:
    assembly = TokenAssembly(1)
    got = []
    for position in [*order[:4], *repeats, *order[4:], *repeats]:
        got += assembly.accept(token(R, position, last=position == 7))
    assert positions(got) == list(range(8))
    assert assembly.is_complete
    assert assembly.finishes() == (FinishReason.LENGTH,)
    assert assembly.accepted() == (tuple(range(8)),)


def test_a_repeat_with_another_token_is_a_conflict_and_not_delivered() -> None:
    assembly = TokenAssembly(1)
    assembly.accept(token(R, 0))
    assert assembly.accept(token(R, 0, value=99)) == []
    assert (assembly.num_duplicates, assembly.num_conflicts) == (1, 1)
    assert assembly.accepted() == ((0,),)


def test_what_is_held_back_can_be_forgotten() -> None:
    assembly = TokenAssembly(1)
    assembly.accept(token(R, 2))
    assembly.forget_held_back()
    assert positions(assembly.accept(token(R, 0)) + assembly.accept(token(R, 1))) == [0, 1]
    assert assembly.positions() == (2,)


def test_tokens_after_the_end_of_a_choice_are_dropped() -> None:
    assembly = TokenAssembly(2)
    assembly.accept(token(R, 1))
    assembly.accept(token(R, 0, last=True))
    assert assembly.accept(token(R, 1)) == []
    assert assembly.num_duplicates == 0
    assert assembly.accept(token(R, 0)) == []
    assert assembly.num_duplicates == 1
    assert assembly.done_choices() == (0,)
    assert not assembly.is_complete
    assert assembly.lacks((0, 0))
    assert assembly.stop(1)
    assert not assembly.stop(1)
    assert assembly.is_complete
    assert not assembly.lacks((0, 0))
    assert assembly.stopped_choices() == (1,)
    assert assembly.finishes() == (FinishReason.LENGTH, FinishReason.STOP)


@pytest.mark.parametrize(("choice", "position"), [(2, 0), (-1, 0), (0, -1)])
def test_impossible_tokens_are_refused(choice: int, position: int) -> None:
    with pytest.raises(RemoteProtocolError):
        TokenAssembly(2).accept(TokenOut(R, choice, position, 5))


def test_a_gap_that_never_fills_is_the_peers_fault() -> None:
    assembly = TokenAssembly(1)
    for position in range(1, MAX_HELD_BACK + 1):
        assert assembly.accept(token(R, position)) == []
    with pytest.raises(RemoteProtocolError, match="never came"):
        assembly.accept(token(R, MAX_HELD_BACK + 1))


def test_what_is_lacking_is_counted_from_where_a_try_began() -> None:
    assembly = TokenAssembly(1)
    for position in range(3):
        assembly.accept(token(R, position))
    assert not assembly.lacks((2,))
    assert assembly.lacks((3,))
    assembly.accept(token(R, 4))
    assert assembly.lacks((3,)), "position 4 waits behind it"
    assembly.accept(token(R, 3))
    assert not assembly.lacks((3,))
