"""The tables: what they list, and whose error it is when they do not."""

from __future__ import annotations

import pytest

from kvtransfer.states import RECEIVE, SEND, Ours, ReceiveState, SendState, Table, Theirs, after
from proto.errors import LocalProtocolError, RemoteProtocolError

EVENTS = (*Ours, *Theirs)


def walk(table: Table, state, *events):  # type: ignore[no-untyped-def, type-arg]
    for event in events:
        state = after(table, state, event)
    return state


def test_the_life_of_blocks_on_p() -> None:
    events = (Ours.OFFER, Theirs.GRANT, Theirs.ACK, Theirs.NACK, Ours.SEAL, Theirs.ACK, Theirs.ADOPTED, Ours.RELEASE)
    assert walk(SEND, SendState.HELD, *events) is SendState.RELEASED


def test_the_life_of_blocks_on_d() -> None:
    events = (
        *(Theirs.OFFER, Ours.RESERVE, Theirs.FRAME, Theirs.FRAME, Theirs.SEAL, Theirs.FRAME),
        *(Ours.VERIFY, Ours.ADOPT, Ours.RUN, Ours.FINISH),
    )
    assert walk(RECEIVE, ReceiveState.IDLE, *events) is ReceiveState.DONE


@pytest.mark.parametrize("event", [Theirs.REFUSE, Theirs.STALE, Ours.LOST])
@pytest.mark.parametrize("state", [SendState.OFFERED, SendState.STREAMING, SendState.SEALED])
def test_p_keeps_what_d_does_not_take(state: SendState, event: Ours | Theirs) -> None:
    assert after(SEND, state, event) is SendState.HELD
    assert after(SEND, SendState.HELD, Ours.REDIRECT) is SendState.OFFERED


@pytest.mark.parametrize("state", [state for state in SendState if state is not SendState.RELEASED])
def test_p_may_let_go_from_any_state(state: SendState) -> None:
    assert after(SEND, state, Ours.RELEASE) is SendState.RELEASED


@pytest.mark.parametrize("state", [s for s in ReceiveState if s not in (ReceiveState.FREED, ReceiveState.DONE)])
@pytest.mark.parametrize("event", [Ours.FREE, Theirs.WITHDRAW, Theirs.STALE])
def test_d_may_let_go_from_any_state(state: ReceiveState, event: Ours | Theirs) -> None:
    assert after(RECEIVE, state, event) is ReceiveState.FREED


@pytest.mark.parametrize(
    ("state", "following"),
    [
        (ReceiveState.IDLE, ReceiveState.FREED),
        (ReceiveState.ASKING, ReceiveState.FREED),
        (ReceiveState.RESERVED, ReceiveState.FREED),
        (ReceiveState.RECEIVING, ReceiveState.FREED),
        (ReceiveState.SEALED, ReceiveState.SEALED),
        (ReceiveState.VERIFIED, ReceiveState.VERIFIED),
        (ReceiveState.ADOPTED, ReceiveState.ADOPTED),
        (ReceiveState.RUNNING, ReceiveState.RUNNING),
    ],
)
def test_a_lost_p_matters_before_its_seal_only(state: ReceiveState, following: ReceiveState) -> None:
    assert after(RECEIVE, state, Ours.LOST) is following


def test_the_ends_are_ends() -> None:
    assert not [move for move in SEND if move[0] is SendState.RELEASED]
    assert not [move for move in RECEIVE if move[0] is ReceiveState.FREED]
    assert {RECEIVE[move] for move in RECEIVE if move[0] is ReceiveState.DONE} == {ReceiveState.DONE}


@pytest.mark.parametrize(("table", "states"), [(SEND, SendState), (RECEIVE, ReceiveState)])
def test_what_is_not_listed_is_a_fault_by_a_named_side(table, states) -> None:  # type: ignore[no-untyped-def]
    num_refused = 0
    for state in states:
        for event in EVENTS:
            if (state, event) in table:
                continue
            num_refused += 1
            with pytest.raises(LocalProtocolError if isinstance(event, Ours) else RemoteProtocolError):
                after(table, state, event)
    assert num_refused > len(table)


@pytest.mark.parametrize(("table", "start"), [(SEND, SendState.HELD), (RECEIVE, ReceiveState.IDLE)])
def test_every_state_can_be_reached(table, start) -> None:  # type: ignore[no-untyped-def]
    reached, frontier = {start}, [start]
    while frontier:
        state = frontier.pop()
        for (before, _), following in table.items():
            if before is state and following not in reached:
                reached.add(following)
                frontier.append(following)
    assert reached == set(type(start))


def test_blocks_are_adopted_only_after_they_are_verified() -> None:
    assert [
        move
        for move, following in RECEIVE.items()
        if following is ReceiveState.VERIFIED and move[0] is not ReceiveState.VERIFIED
    ] == [(ReceiveState.SEALED, Ours.VERIFY)]
    assert [
        move
        for move, following in RECEIVE.items()
        if following is ReceiveState.ADOPTED and move[0] is not ReceiveState.ADOPTED
    ] == [(ReceiveState.VERIFIED, Ours.ADOPT)]
