"""How a worker is, as it says itself. Knows nothing of how that is found out."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Phase(enum.Enum):
    STARTING = "starting"
    LOADING = "loading"
    WARMING = "warming"
    READY = "ready"
    DRAINING = "draining"
    """Finishing what it has; takes nothing new."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class HealthReport:
    """``is_ready``: give it work. False outside READY, and in READY while the engine has work but does not step."""

    phase: Phase
    is_ready: bool
    detail: str = ""
    """Why, in words: what is being loaded, or what went wrong."""
    progress: float | None = None
    """Share of the phase that is done, from 0 to 1, where it is known."""
    last_step_age_s: float | None = None
    """Seconds since the engine last finished a step (or was idle); None before there is an engine."""
    is_working: bool = False
