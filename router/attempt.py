"""What the life of a request is made of: its rules, one try of it, and what it needs from the world around it.

Knows no order of events; that is ``life``'s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from proto.control import FromRouter
from proto.errors import TandemError
from proto.ids import Epoch, Generation, RequestId
from proto.lifecycle import Stage
from proto.request import FinishReason, Request, TokenOut
from router.contract import StageTimes
from router.policy import Candidate, Decision, Way
from router.recovery import Remedy, Side
from router.stages import StageChange


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """``patience_s``: how long a request waits for a worker to come back when none is left. ``room_patience_s``: how
    long computed blocks wait for a decode worker that has room. ``verdict_s``: how long a decode worker may take to say
    whether it has everything, once its prefill worker is gone."""

    request_timeout_s: float = 600.0
    max_attempts: int = 6
    max_buffered_tokens: int = 4096
    lease_s: float = 30.0
    patience_s: float = 10.0
    room_patience_s: float = 120.0
    verdict_s: float = 5.0


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

    def set(self, delay: float, callback: Callable[[], object]) -> None:
        self.cancel()
        self._timer = self._timers.call_later(delay, callback)

    def cancel(self) -> None:
        """Idempotent, also after it happened."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Dispatcher(Protocol):
    """Finds workers and carries messages, for all lives."""

    def place(self, request: Request, way: Way, avoid: frozenset[Epoch], numerics: str) -> Decision:
        """Raises NoWorker or Overloaded."""

    def send(self, worker: Candidate, message: FromRouter) -> None:
        """Never blocks or raises; a message to a lost worker is dropped, since ``worker_lost`` follows."""

    def mark_full(self, epoch: Epoch, seconds: float) -> None: ...

    def mark_draining(self, epoch: Epoch) -> None: ...

    def ended(self, request: RequestId) -> None:
        """Called exactly once per life that began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEnd:
    """What is known of a request when it ends. ``times`` are the seconds in each stage, over all tries."""

    request: Request
    label: str
    stage: Stage
    finishes: tuple[FinishReason, ...]
    num_generated: int
    num_cached: int
    num_bytes_moved: int
    total_s: float
    times: StageTimes


class Listener(Protocol):
    """Who is told what happens to requests (``observing``). Every method returns at once and never raises."""

    def stage_changed(self, change: StageChange) -> None: ...

    def placed(self, *, local: bool) -> None: ...

    def recovering(self, remedy: Remedy) -> None: ...

    def tokens_came(self, tokens: Sequence[TokenOut], at: float) -> None:
        """New tokens of one request, each once, at ``at`` on the router's clock."""

    def turned_away(self, error: TandemError) -> None:
        """A request got an error before anything was sent."""

    def refused(self, reason: str) -> None:
        """A message was not applied: ``stale`` (an older try's), ``unknown`` (no such request), or ``conflict`` (a
        token that differs from the one delivered)."""

    def ended(self, end: RequestEnd) -> None: ...


@dataclass(slots=True)
class Try:
    """One generation. ``prefill`` is None once it is of no more use; ``decode`` is None while none is found."""

    generation: Generation
    prefill: Candidate | None
    prefill_since: Generation
    """The generation under which ``prefill`` got the prompt; redirects raise ``generation`` alone."""
    decode: Candidate | None
    local: bool
    adopted: bool = False

    def side_of(self, epoch: Epoch) -> Side | None:
        if self.decode is not None and self.decode.epoch == epoch:
            return Side.DECODE
        return Side.PREFILL if self.prefill is not None and self.prefill.epoch == epoch else None

    def admits(self, epoch: Epoch, generation: Generation) -> Side | None:
        """The side that speaks; None: an older try's, or nobody of this one. A redirect does not outlaw what P sent."""
        side = self.side_of(epoch)
        oldest = self.prefill_since if side is Side.PREFILL else self.generation
        return side if side is not None and oldest <= generation <= self.generation else None
