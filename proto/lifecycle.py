"""The stages of a request: the one list that metrics, traces, timings and fault tests share.

RECEIVED ─▶ ROUTED ─▶ QUEUED ─▶ PREFILLING ─▶ STREAMING ─▶ SEALED ─▶ ADOPTED ─▶ DECODING ─▶ FINISHED
              ▲  └────────────────── local prefill on D ────────────────────────▶ │
              └──────────── next generation (a worker died, refused, or was redirected) ◀────┘

from every stage that is not terminal: ABORTED (the client left) or FAILED (an error reply)
"""

from __future__ import annotations

import enum


class Stage(enum.Enum):
    RECEIVED = "received"
    """The router is validating, templating, tokenising and hashing."""
    ROUTED = "routed"
    """A prefill and a decode worker are chosen and told."""
    QUEUED = "queued"
    """Waiting on the worker that computes the prompt."""
    PREFILLING = "prefilling"
    """The first chunk is scheduled; a decode worker is asked for room."""
    STREAMING = "streaming"
    """Room is granted; full blocks travel while later chunks compute."""
    SEALED = "sealed"
    """The first token is sampled and every block is on its way."""
    ADOPTED = "adopted"
    """The decode worker has verified every block."""
    DECODING = "decoding"
    """The decode worker generates."""
    FINISHED = "finished"
    ABORTED = "aborted"
    FAILED = "failed"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL


TERMINAL = frozenset({Stage.FINISHED, Stage.ABORTED, Stage.FAILED})
NOT_BEGUN = frozenset({Stage.RECEIVED, Stage.ROUTED, Stage.QUEUED})
"""Nothing of it has been computed yet."""

_FORWARD: dict[Stage, frozenset[Stage]] = {
    Stage.RECEIVED: frozenset({Stage.ROUTED}),
    Stage.ROUTED: frozenset({Stage.QUEUED}),
    Stage.QUEUED: frozenset({Stage.PREFILLING}),
    Stage.PREFILLING: frozenset({Stage.STREAMING, Stage.SEALED, Stage.DECODING, Stage.FINISHED}),
    Stage.STREAMING: frozenset({Stage.SEALED, Stage.FINISHED}),
    Stage.SEALED: frozenset({Stage.STREAMING, Stage.ADOPTED, Stage.FINISHED}),
    Stage.ADOPTED: frozenset({Stage.DECODING, Stage.FINISHED}),
    Stage.DECODING: frozenset({Stage.FINISHED}),
}


def may_follow(stage: Stage, next_stage: Stage) -> bool:
    """Whether a request may move from ``stage`` to ``next_stage``.

    Every living stage may end in ABORTED or FAILED, and may go back to ROUTED under the next generation.
    """
    if stage.is_terminal:
        return False
    if next_stage in (Stage.ABORTED, Stage.FAILED):
        return True
    if next_stage is Stage.ROUTED:
        return True
    return next_stage in _FORWARD[stage]
