"""How long a request may stay where it is without a sign of life, and the alarm that says so.

    stage of the try                       the silent worker      limit
    -------------------------------------  ---------------------  -----------
    told, its prompt not begun             who computes it        queued_s
    its prompt is computed                 who computes it        prefill_s
    computed; its blocks are on their way  the decode worker      transfer_s
    the decode worker has it               the decode worker      silence_s

A dead process is noticed by its stream, and a stalled one by its health, long before: this is for everything else.
Knows seconds; knows no workers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from proto.lifecycle import NOT_BEGUN, Stage
from router.timers import Cancellable, Timers

_SLACK_S = 1e-3
"""Clocks are not exact: this early is on time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLimits:
    """Seconds without news after which a worker counts as lost for one request."""

    queued_s: float = 300.0
    prefill_s: float = 180.0
    transfer_s: float = 60.0
    silence_s: float = 120.0

    def of(self, stage: Stage, *, is_computed: bool, has_decode: bool) -> float:
        """``is_computed``: the first tokens are in. ``has_decode``: the decode worker has all it needs."""
        if is_computed:
            return self.silence_s if has_decode else self.transfer_s
        return self.queued_s if stage in NOT_BEGUN else self.prefill_s


class Watch:
    """Calls ``late`` when time is up. To be heard in time costs no timer, so every token may be a sign of life."""

    def __init__(self, timers: Timers, late: Callable[[], None]) -> None:
        self._timers = timers
        self._late = late
        self._until = 0.0
        self._due = 0.0
        self._timer: Cancellable | None = None

    def allow(self, seconds: float) -> None:
        """Time is up in ``seconds`` from now, whatever was allowed before."""
        self._until = self._timers.time() + seconds
        if self._timer is None or self._until < self._due:
            self._arm(seconds)

    def cancel(self) -> None:
        """Nothing is expected of anybody. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, seconds: float) -> None:
        self.cancel()
        self._due = self._timers.time() + seconds
        self._timer = self._timers.call_later(seconds, self._ring)

    def _ring(self) -> None:
        self._timer = None
        left = self._until - self._timers.time()
        if left > _SLACK_S:
            self._arm(left)
        else:
            self._late()
