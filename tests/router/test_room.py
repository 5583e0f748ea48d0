"""Room on a decode worker: what is lacking now and soon, and how many tokens it takes until there is enough."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.control import SOON_TOKENS, Load
from router.room import Room


def room(
    free: int, *, own: int = 20, soon: int = 0, running: int = 0, ahead: int = 0, usual: float = 0.0, blocks: int = 100
) -> Room:
    load = Load(num_running=running, num_free_blocks=free, num_blocks=blocks, num_soon_free_blocks=soon)
    return Room(load=load, own=own, ahead=ahead, usual_tokens=usual)


@pytest.mark.parametrize(
    ("given", "lacking", "out_of_sight"),
    [
        (room(20), 0.0, 0.0),
        (room(15), 0.25, 0.25),
        (room(15, soon=5), 0.25, 0.0),
        (room(15, soon=2), 0.25, 0.15),
        (room(20, running=10), 0.5, 0.5),  # each of ten will want a block more
        (room(20, running=10, soon=10), 0.5, 0.0),
        (room(20, ahead=10), 0.5, 0.5),
        (room(0, ahead=500), 1.0, 1.0),
        (room(0, blocks=0), 0.0, 0.0),
    ],
)
def test_what_is_lacking(given: Room, lacking: float, out_of_sight: float) -> None:
    assert (given.share_lacking, given.share_out_of_sight) == (pytest.approx(lacking), pytest.approx(out_of_sight))


def test_an_end_that_is_certain_says_when_there_is_room() -> None:
    assert room(10, soon=10).tokens_until == SOON_TOKENS
    assert room(10, soon=40).tokens_until == SOON_TOKENS / 4
    assert room(10, soon=5).tokens_until == 2 * SOON_TOKENS


def test_usual_answers_say_when_there_is_room_where_no_end_is_certain() -> None:
    """90 blocks are in use, and all of them are free once their sequences have said a usual answer."""
    assert room(10, usual=270.0).tokens_until == pytest.approx(30.0)
    assert room(10, usual=270.0, soon=1).tokens_until == pytest.approx(30.0), "the sooner of the two"
    assert math.isinf(room(10).tokens_until)


def test_what_goes_before_it_turns_the_whole_memory_over() -> None:
    """1000 blocks are to go before it through a memory of 100, which is free once in 50 tokens."""
    assert room(0, ahead=1000, usual=50.0).tokens_until == pytest.approx(510.0)


def test_a_worker_that_says_nothing_of_its_memory_has_room() -> None:
    assert room(0, blocks=0).tokens_until == 0


@pytest.mark.parametrize("own", [100, 101, 1000])
def test_alone_it_lacks_nothing(own: int) -> None:
    """What never fits is refused by the worker, by name."""
    assert room(100, own=own).tokens_until == 0


def test_it_waits_for_no_more_than_there_is() -> None:
    """Once both that run have ended nothing needs to be kept for their growth."""
    assert room(98, own=100, running=2, usual=40.0).tokens_until == pytest.approx(40.0)


ROOMS = st.builds(
    room,
    st.integers(0, 100),
    own=st.integers(1, 300),
    soon=st.integers(0, 100),
    running=st.integers(0, 50),
    ahead=st.integers(0, 300),
    usual=st.sampled_from([0.0, 3.0, 500.0]),
)


@given(ROOMS, st.integers(0, 100))
def test_more_that_is_free_or_cached_is_never_worse(one: Room, more: int) -> None:
    for better in (
        dataclasses.replace(one, load=dataclasses.replace(one.load, num_free_blocks=one.load.num_free_blocks + more)),
        dataclasses.replace(
            one, load=dataclasses.replace(one.load, num_soon_free_blocks=one.load.num_soon_free_blocks + more)
        ),
        dataclasses.replace(one, own=max(1, one.own - more)),
        dataclasses.replace(one, ahead=max(0, one.ahead - more)),
    ):
        assert better.share_lacking <= one.share_lacking
        assert better.share_out_of_sight <= one.share_out_of_sight
