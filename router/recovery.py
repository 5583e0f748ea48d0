"""What to do when something goes wrong with a try of a request: one table, no I/O.

    trouble                                   the try so far                       remedy
    ----------------------------------------  -----------------------------------  --------------------------------
    P lost                                    D has adopted, first tokens are in   none: D has all it needs
                                              D was offered it, first tokens in    wait for D's word: adopted or not
                                              else                                 again
    D lost, or D cannot (full, unknown, ...)  P has the blocks                     redirect: P sends them to another
                                              D has adopted, or is alone           again
    P says D refused, or D is lost            D has adopted                        none: P's news is old
                                              P holds the blocks                   redirect
                                              P has let go                         again
    P says D ended this try                   P holds the blocks                   wait for D's word: why
    P cannot (full, draining, unknown, ...)   D has adopted                        none
                                              else                                 again

"Again" is a restart while the client has no token, and from then on a resume: the tokens it has are forced, so it sees
one sequence. It goes to where most of that is cached (``policy``): a prefill worker that has the prompt computes the
rest, says the next token, and hands over as for any prompt; only the one after a hand-off that failed is a decode
worker's alone. Where a redirect finds that every decode worker has been tried, it is P that is cut off: again, without
it. Every remedy but none and waiting is a new generation, which outlaws whatever the last one still sends.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from proto.control import Failed, RejectReason
from proto.errors import (
    InvalidRequest,
    LocalFault,
    NotFinite,
    NotSupported,
    Overloaded,
    TandemError,
    Unavailable,
    UserError,
)


class Side(enum.Enum):
    PREFILL = "prefill"
    DECODE = "decode"


class Remedy(enum.Enum):
    NONE = "none"
    AWAIT_VERDICT = "await_verdict"
    """The decode worker knows whether it has everything, or goes on alone, and will say so."""
    REDIRECT = "redirect"
    RESTART = "restart"
    RESUME = "resume"


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """A try as the router knows it."""

    prefill_has_blocks: bool
    """A live prefill worker has, or is computing, the prompt's blocks for this try."""
    offered: bool
    """The decode worker may have heard of the blocks. Of a redirect it has perhaps not: P may have died before it."""
    adopted: bool
    started: bool
    """The router holds at least one token."""
    lacks_first: bool
    """A running choice still waits for the try's first token, which only the prefill worker sends."""

    @property
    def again(self) -> Remedy:
        return Remedy.RESUME if self.started else Remedy.RESTART


def after_loss(side: Side, situation: Situation) -> Remedy:
    """A worker of this try is gone: its stream broke, or it is another incarnation now."""
    if side is Side.DECODE:
        return Remedy.REDIRECT if situation.prefill_has_blocks else situation.again
    if situation.adopted and not situation.lacks_first:
        return Remedy.NONE
    return situation.again if situation.lacks_first or not situation.offered else Remedy.AWAIT_VERDICT


def after_rejection(side: Side, reason: RejectReason, held: bool, situation: Situation) -> Remedy:
    """The worker on ``side`` says that it cannot go on with this try."""
    if side is Side.DECODE:
        return Remedy.REDIRECT if situation.prefill_has_blocks else situation.again
    if situation.adopted and not situation.lacks_first:
        return Remedy.NONE
    if held and not situation.adopted:
        if reason is RejectReason.STALE:
            return Remedy.AWAIT_VERDICT
        if reason in (RejectReason.REFUSED, RejectReason.MISMATCH, RejectReason.PEER_LOST):
            return Remedy.REDIRECT
    return situation.again


def is_nobodys_fault(reason: RejectReason) -> bool:
    """Whether a rejection says nothing about the request: it is not counted as an attempt."""
    return reason in (RejectReason.FULL, RejectReason.DRAINING, RejectReason.REFUSED)


_BY_STATUS: dict[int, type[TandemError]] = {400: InvalidRequest, 429: Overloaded, 501: NotSupported, 503: Unavailable}


def error_of(failed: Failed, stage: str) -> TandemError:
    """The error a worker's Failed stands for. What is not the client's fault and not known is ours."""
    if failed.kind == NotFinite.kind:
        return NotFinite(failed.message, stage=stage)
    known = _BY_STATUS.get(failed.status)
    if known is None:
        known = UserError if 400 <= failed.status < 500 else LocalFault
    return known(failed.message, param=failed.param, stage=stage)
