"""How long a request has been in its present stage on this worker."""

from __future__ import annotations

import time

from proto.lifecycle import Stage


class StageClock:
    """Starts in ``stage``, now."""

    __slots__ = ("_entered", "stage")

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._entered = time.monotonic()

    def enter(self, stage: Stage) -> float:
        """Moves to ``stage`` and returns the seconds spent in the one before."""
        now = time.monotonic()
        spent, self.stage, self._entered = now - self._entered, stage, now
        return spent
