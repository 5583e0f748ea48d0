"""How a worker is: the phase it is in, and whether its engine makes progress.

Being alive is answering at all; being ready is more: a worker whose engine has work but has not finished a step for
``stall_after_s`` is not ready, whatever its phase says. Knows nothing of engines but their heartbeat.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from proto.health import HealthReport, Phase

__all__ = ["Health", "HealthReport", "Heartbeat", "Phase"]

STALL_AFTER_S = 60.0


class Heartbeat(Protocol):
    """When the engine last finished a step or began to have work, and whether it has work now."""

    @property
    def last_step_monotonic(self) -> float: ...

    @property
    def is_working(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class _State:
    phase: Phase
    detail: str = ""
    progress: float | None = None


class Health:
    """Set by whoever runs the worker (from any thread), read by probes, routers and the ledger."""

    def __init__(self, *, stall_after_s: float = STALL_AFTER_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._stall_after_s = stall_after_s
        self._clock = clock
        self._state = _State(Phase.STARTING)
        self._heartbeat: Callable[[], Heartbeat | None] = lambda: None

    def watch(self, heartbeat: Callable[[], Heartbeat | None]) -> None:
        """From here on ``heartbeat`` is asked for the engine's; it answers None while there is no engine."""
        self._heartbeat = heartbeat

    @property
    def phase(self) -> Phase:
        return self._state.phase

    def loading(self, detail: str, progress: float | None = None) -> None:
        """``detail`` names what is loaded, ``progress`` is its share done. Fits as an engine's ``on_phase``."""
        self._enter(_State(Phase.LOADING, detail, progress))

    def warming(self) -> None:
        self._enter(_State(Phase.WARMING, "warming up"))

    def ready(self) -> None:
        self._enter(_State(Phase.READY))

    def draining(self) -> None:
        self._enter(_State(Phase.DRAINING, "finishing what it has; takes nothing new"))

    def failed(self, detail: str) -> None:
        """Final: no other phase follows, and the first failure's words stay."""
        self._enter(_State(Phase.FAILED, detail))

    def _enter(self, state: _State) -> None:
        if self._state.phase is not Phase.FAILED:
            self._state = state

    def report(self) -> HealthReport:
        state = self._state
        heartbeat = self._heartbeat()
        if heartbeat is None:
            return HealthReport(state.phase, state.phase is Phase.READY, state.detail, state.progress)
        age = max(0.0, self._clock() - heartbeat.last_step_monotonic)
        stalled = heartbeat.is_working and age > self._stall_after_s
        detail = f"the engine has work, and finished no step for {age:.0f} s" if stalled else state.detail
        is_ready = state.phase is Phase.READY and not stalled
        return HealthReport(state.phase, is_ready, detail, state.progress, age, heartbeat.is_working)
