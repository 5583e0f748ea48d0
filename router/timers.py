"""A clock, and things that happen later. Knows the event loop; knows nothing of what happens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol


class Cancellable(Protocol):
    def cancel(self) -> object: ...


class Timers(Protocol):
    """What of an event loop a life needs (``LoopTimers``)."""

    def time(self) -> float: ...

    def call_later(self, delay: float, callback: Callable[[], object], /) -> Cancellable: ...


class LoopTimers:
    """The running event loop's timers, with a clock finer than uvloop's own, which counts whole milliseconds."""

    def time(self) -> float:
        return time.monotonic()

    def call_later(self, delay: float, callback: Callable[[], object], /) -> Cancellable:
        return asyncio.get_running_loop().call_later(delay, callback)


class Alarm:
    """One thing that will happen later, unless it is set anew or cancelled."""

    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self._timer: Cancellable | None = None

    @property
    def is_set(self) -> bool:
        """Whether it will happen."""
        return self._timer is not None

    def set(self, delay: float, callback: Callable[[], object]) -> None:
        self.cancel()
        self._timer = self._timers.call_later(delay, lambda: self._ring(callback))

    def _ring(self, callback: Callable[[], object]) -> None:
        self._timer = None
        callback()

    def cancel(self) -> None:
        """Idempotent, also after it happened."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
