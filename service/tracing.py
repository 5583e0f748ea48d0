"""Who hears of a request's stages: metrics, logs, traces and fault tests, all by the one list in ``proto.lifecycle``.

Knows names and times; knows nothing of what a stage does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from proto.ids import RequestId
from proto.lifecycle import Stage

log = logging.getLogger(__name__)


class StageObserver(Protocol):
    def entered(self, request: RequestId, stage: Stage, at: float) -> None:
        """``request`` entered ``stage`` at ``at`` (monotonic seconds). Called often: returns at once."""


class StageFanOut:
    """Passes every stage on to each observer. One that raises is logged, and spoils nothing for the others."""

    def __init__(self, observers: Iterable[StageObserver] = ()) -> None:
        self._observers = list(observers)

    def add(self, observer: StageObserver) -> None:
        self._observers.append(observer)

    def entered(self, request: RequestId, stage: Stage, at: float) -> None:
        for observer in self._observers:
            try:
                observer.entered(request, stage, at)
            except Exception:
                log.exception("an observer of stages failed", extra={"request": request})


class StageTimer:
    """Tells how long each stage took, when it is left. Forgets a request at its terminal stage."""

    def __init__(self, stage_left: Callable[[Stage, float], None]) -> None:
        self._stage_left = stage_left
        self._since: dict[RequestId, tuple[Stage, float]] = {}

    def __len__(self) -> int:
        """Requests under way."""
        return len(self._since)

    def entered(self, request: RequestId, stage: Stage, at: float) -> None:
        if (last := self._since.pop(request, None)) is not None:
            self._stage_left(last[0], max(0.0, at - last[1]))
        if not stage.is_terminal:
            self._since[request] = (stage, at)
