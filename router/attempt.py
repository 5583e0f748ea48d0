"""What the life of a request is made of: its rules, one try of it, and what it needs from the world around it.

Knows no order of events; that is ``life``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from proto.control import FromRouter
from proto.ids import Epoch, Generation, RequestId
from proto.request import Request
from router.policy import Candidate, Decision, Way
from router.recovery import Remedy, Side
from router.stages import StageChange


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """``patience_s``: how long a request waits for a worker to come back when none is left. ``verdict_s``: how long a
    decode worker may take to say whether it has everything, once its prefill worker is gone."""

    request_timeout_s: float = 600.0
    max_attempts: int = 6
    max_buffered_tokens: int = 4096
    lease_s: float = 30.0
    patience_s: float = 10.0
    verdict_s: float = 5.0


class Cancellable(Protocol):
    def cancel(self) -> object: ...


class Timers(Protocol):
    """What of an event loop a life needs; an asyncio loop is one."""

    def time(self) -> float: ...

    def call_later(self, delay: float, callback: Callable[[], object], /) -> Cancellable: ...


class Dispatcher(Protocol):
    """Finds workers and carries messages, for all lives."""

    def place(self, request: Request, way: Way, avoid: frozenset[Epoch], numerics: str) -> Decision:
        """Raises NoWorker or Overloaded."""

    def send(self, worker: Candidate, message: FromRouter) -> None:
        """Never blocks or raises; a message to a lost worker is dropped, since ``worker_lost`` follows."""

    def mark_full(self, epoch: Epoch, seconds: float) -> None: ...

    def mark_draining(self, epoch: Epoch) -> None: ...

    def stage_changed(self, change: StageChange) -> None: ...

    def recovering(self, request: RequestId, remedy: Remedy) -> None: ...

    def ended(self, request: RequestId) -> None:
        """Called exactly once per life that began."""


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
