"""The hand-off as two tables. Whatever a table does not list is a protocol error by a named side.

    P   HELD ─▶ OFFERED ─▶ STREAMING ─▶ SEALED ─▶ ADOPTED ─▶ RELEASED
         ▲         │           │           │
         └─────────┴───────────┴───────────┘   Refuse, Stale, or D is lost: the blocks are kept, the router is told
        Redirect: to OFFERED, under the next generation. Abort or the lease's end: to RELEASED, from any state.
        A D that will not have them ends its try alone: P holds them for the router, whose Redirect may be on its way.

    D   IDLE ─▶ ASKING ─▶ RESERVED ─▶ RECEIVING ─▶ SEALED ─▶ VERIFIED ─▶ ADOPTED ─▶ RUNNING ─▶ DONE
        Abort, Withdraw, P lost before SEALED, a newer try, or the lease's end: to FREED, from any state.

IDLE and ASKING hold nothing yet. From ADOPTED on the decode tier owns the blocks and walks the rest of the table.
Knows the order of things; knows nothing of messages' contents, blocks or time.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import TypeVar

from proto.errors import LocalProtocolError, RemoteProtocolError


class SendState(enum.Enum):
    HELD = "held"
    OFFERED = "offered"
    STREAMING = "streaming"
    SEALED = "sealed"
    ADOPTED = "adopted"
    RELEASED = "released"


class ReceiveState(enum.Enum):
    IDLE = "idle"
    ASKING = "asking"
    RESERVED = "reserved"
    RECEIVING = "receiving"
    SEALED = "sealed"
    VERIFIED = "verified"
    ADOPTED = "adopted"
    RUNNING = "running"
    DONE = "done"
    FREED = "freed"


class Ours(enum.Enum):
    """Moves that our own side makes."""

    OFFER = "offer"
    SEAL = "seal"
    REDIRECT = "redirect"
    RELEASE = "release"
    """P lets go: done, aborted, or the lease has ended."""
    LOST = "lost"
    """The link is gone, or the peer turns out to be another incarnation."""
    RESERVE = "reserve"
    REFUSE = "refuse"
    VERIFY = "verify"
    """The last missing block is verified, and the Seal is here."""
    ADOPT = "adopt"
    RUN = "run"
    FINISH = "finish"
    FREE = "free"
    """D lets go: aborted, superseded, damaged beyond repair, or the lease has ended."""


class Theirs(enum.Enum):
    """Messages of the peer, under the fence that we hold."""

    OFFER = "Offer"
    FRAME = "Frame"
    SEAL = "Seal"
    WITHDRAW = "Withdraw"
    GRANT = "Grant"
    REFUSE = "Refuse"
    ACK = "Ack"
    NACK = "Nack"
    ADOPTED = "Adopted"
    STALE = "Stale"
    """This try is over on the peer's side."""


S = TypeVar("S", SendState, ReceiveState)
Table = Mapping[tuple[S, Ours | Theirs], S]

_H, _O, _ST, _SE, _A, _R = SendState

SEND: Table[SendState] = {
    (_H, Ours.OFFER): _O,
    (_O, Theirs.GRANT): _ST,
    (_ST, Ours.SEAL): _SE,
    (_SE, Theirs.ADOPTED): _A,
    (_A, Ours.RELEASE): _R,
    # Blocks and their answers; a Grant may come again, since an Offer may be sent again.
    **{(state, event): state for state in (_ST, _SE) for event in (Theirs.GRANT, Theirs.ACK, Theirs.NACK)},
    # D will not have it, the try is over there, or D is gone: kept for another D.
    **{(state, event): _H for state in (_O, _ST, _SE) for event in (Theirs.REFUSE, Theirs.STALE, Ours.LOST)},
    **{(state, Ours.REDIRECT): _O for state in (_H, _O, _ST, _SE)},
    # Our abort, or our lease's end.
    **{(state, Ours.RELEASE): _R for state in (_H, _O, _ST, _SE)},
}

_ID, _AS, _RE, _RC, _DS, _V, _AD, _RU, _DO, _F = ReceiveState

RECEIVE: Table[ReceiveState] = {
    (_ID, Theirs.OFFER): _AS,
    (_AS, Ours.RESERVE): _RE,
    (_AS, Ours.REFUSE): _F,
    (_RE, Theirs.FRAME): _RC,
    (_RC, Theirs.FRAME): _RC,
    # Everything may be present already; and a Seal may overtake frames that are sent again.
    **{(state, Theirs.SEAL): _DS for state in (_RE, _RC)},
    (_DS, Ours.VERIFY): _V,
    (_V, Ours.ADOPT): _AD,
    (_AD, Ours.RUN): _RU,
    (_RU, Ours.FINISH): _DO,
    # What P repeats until it is answered.
    **{(state, Theirs.OFFER): state for state in (_AS, _RE, _RC, _DS, _V, _AD, _RU, _DO)},
    **{(state, event): state for state in (_DS, _V, _AD, _RU, _DO) for event in (Theirs.FRAME, Theirs.SEAL)},
    # P is lost: before its Seal all is lost, after it the blocks that are here decide.
    **{(state, Ours.LOST): _F for state in (_ID, _AS, _RE, _RC)},
    **{(state, Ours.LOST): state for state in (_DS, _V, _AD, _RU, _DO)},
    **{
        (state, event): _F
        for state in (_ID, _AS, _RE, _RC, _DS, _V, _AD, _RU)
        for event in (Theirs.WITHDRAW, Theirs.STALE, Ours.FREE)
    },
}


def after(table: Table[S], state: S, event: Ours | Theirs) -> S:
    """The state that follows.

    Raises RemoteProtocolError where the peer may not say that now, LocalProtocolError where we may not.
    """
    following = table.get((state, event))
    if following is not None:
        return following
    if isinstance(event, Theirs):
        raise RemoteProtocolError(f"{event.value} from the peer while {state.value}")
    raise LocalProtocolError(f"{event.value} while {state.value}")
