"""What the life of a request is made of: its rules, one try of it, and what it needs from the world around it.

Knows no order of events; that is ``life``'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from proto.control import Abort, Attach, FromRouter, Peer, Prefill, Redirect, RejectReason
from proto.errors import TandemError
from proto.ids import Epoch, Generation, RequestId
from proto.lifecycle import Stage
from proto.request import FinishReason, Request, TokenOut
from router.assembly import TokenAssembly
from router.contract import StageTimes
from router.deadlines import StageLimits
from router.policy import ROOM_S, Candidate, Decision, Way
from router.recovery import Remedy, Side, Situation
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
    room_patience_s: float = ROOM_S
    verdict_s: float = 5.0
    limits: StageLimits = field(default_factory=StageLimits)


class Dispatcher(Protocol):
    """Finds workers and carries messages, for all lives."""

    def place(
        self, request: Request, way: Way, avoid: frozenset[Epoch], numerics: str, *, is_new: bool = False
    ) -> Decision:
        """Raises NoWorker or Overloaded."""

    def had_worker_lately(self) -> bool:
        """Whether a request was placed a moment ago, so that a worker may soon be back."""

    def send(self, worker: Candidate, message: FromRouter) -> None:
        """Never blocks or raises; a message to a lost worker is dropped, since ``worker_lost`` follows."""

    def mark_full(self, epoch: Epoch, seconds: float) -> None: ...

    def mark_draining(self, epoch: Epoch) -> None: ...

    def failed_on(self, epoch: Epoch) -> None:
        """A try failed, and it was this worker's doing."""

    def served_by(self, epoch: Epoch) -> None:
        """A request is complete, and this worker had a part in it."""

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
    num_longest: int
    """Tokens of the choice that got most."""
    num_cached: int
    num_bytes_moved: int
    num_duplicates: int
    """Tokens that had come before."""
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
        """A message was not applied: ``stale`` (an older try's), ``unknown`` (no such request), ``malformed`` (makes no
        sense), or ``conflict`` (a token that differs from the one delivered)."""

    def ended(self, end: RequestEnd) -> None: ...


class _Silence:
    """A listener who keeps nothing."""

    def stage_changed(self, change: StageChange) -> None: ...

    def placed(self, *, local: bool) -> None: ...

    def recovering(self, remedy: Remedy) -> None: ...

    def tokens_came(self, tokens: Sequence[TokenOut], at: float) -> None: ...

    def turned_away(self, error: TandemError) -> None: ...

    def refused(self, reason: str) -> None: ...

    def ended(self, end: RequestEnd) -> None: ...


SILENCE: Listener = _Silence()
"""For what is no request of a client."""


@dataclass(slots=True)
class Try:
    """One generation. ``prefill`` is None once it is of no more use; ``decode`` is None while none is found."""

    request: Request
    """As its workers were sent it: a resume carries the tokens that the client had when it began."""
    generation: Generation
    prefill: Candidate | None
    prefill_since: Generation
    """The generation under which ``prefill`` got the prompt; redirects raise ``generation`` alone."""
    decode: Candidate | None
    local: bool
    adopted: bool = False
    has_heard_decode: bool = False
    """The decode worker has said something of it."""
    attach: Attach | None = None
    """What the decode worker was told."""

    def next_request(self, original: Request, remedy: Remedy, assembly: TokenAssembly) -> Request:
        """What the workers of the try after this one are sent."""
        match remedy:
            case Remedy.RESUME:
                return replace(original, forced=assembly.accepted())
            case Remedy.REDIRECT:
                return self.request
            case _:
                return original

    def following(self, request: Request, decision: Decision, *, keeps_prefill: bool) -> Try:
        """The next generation: with the blocks that ``prefill`` holds, or from the start."""
        generation = Generation(self.generation + 1)
        if keeps_prefill:
            return Try(request, generation, self.prefill, self.prefill_since, decision.decode, local=False)
        return Try(request, generation, decision.prefill, generation, decision.decode, decision.local)

    @property
    def is_relayed(self) -> bool:
        """A resume by way of a prefill worker, as long as the decode worker has not adopted it."""
        return self.request.is_resumed and not self.local and not self.adopted

    def orders(self, lease_s: float) -> Iterator[tuple[Candidate, FromRouter]]:
        """What its workers are told: first the decode worker, so that it expects what the prefill worker offers."""
        request, decode = self.request, self.decode
        assert decode is not None
        self.attach = Attach(request, self.generation, self.local, lease_s, request.num_forced)
        yield decode, self.attach
        if self.prefill is None:
            return
        peer = Peer(decode.worker, decode.epoch, decode.address)
        if self.prefill_since == self.generation:
            yield self.prefill, Prefill(request, self.generation, peer, lease_s)
        else:
            yield self.prefill, Redirect(request.id, self.generation, peer)

    def leave(self, *, keep_prefill: bool) -> Iterator[tuple[Candidate, FromRouter]]:
        """Its workers are told to let go, and are none of its any more."""
        abort = self.abort()
        if self.decode is not None:
            yield self.decode, abort
            self.decode = None
        if self.prefill is not None and not keep_prefill:
            yield self.prefill, abort
            self.prefill = None

    def go_on_alone(self) -> Iterator[tuple[Candidate, FromRouter]]:
        """The blocks came damaged, and the decode worker computes the prompt itself: they are of no more use."""
        self.local = True
        yield from self.drop_prefill()

    def drop_prefill(self) -> Iterator[tuple[Candidate, FromRouter]]:
        """What its prefill worker has is of no more use."""
        if self.prefill is not None:
            yield self.prefill, self.abort()
            self.prefill = None

    def attach_again(self, positions: tuple[int, ...]) -> Iterator[tuple[Candidate, FromRouter]]:
        """For a decode worker whose stream broke: its tokens from ``positions`` on, under the same generation."""
        if self.decode is not None and self.attach is not None:
            yield self.decode, replace(self.attach, positions=positions)

    def stop(self, choices: tuple[int, ...]) -> Iterator[tuple[Candidate, FromRouter]]:
        """The decode worker is told that no more of ``choices`` is wanted."""
        if choices and self.decode is not None:
            yield self.decode, Abort(self.request.id, self.generation, choices)

    def lose(self, side: Side) -> None:
        """That worker is none of its any more, and hears nothing."""
        if side is Side.PREFILL:
            self.prefill = None
        else:
            self.decode = None

    def workers(self) -> list[Candidate]:
        return [worker for worker in (self.prefill, self.decode) if worker is not None]

    def holders(self) -> list[Candidate]:
        """Those that hold something for it: once it is adopted, the prefill worker has let go."""
        return [worker for worker in self.workers() if worker is not self.prefill or not self.adopted]

    def blamed(self, epoch: Epoch, reason: RejectReason, remedy: Remedy) -> set[Epoch]:
        """Whom the next try should do without, if it can, after ``epoch`` has rejected this one.

        Nobody, where the news is of the other side, or where a redirect came too late: P may well have it all cached.
        """
        if remedy is Remedy.REDIRECT:
            return {self.decode.epoch} if self.decode is not None else set()
        is_redirected = self.side_of(epoch) is Side.PREFILL and self.prefill_since != self.generation
        return set() if is_redirected or reason is RejectReason.PEER_LOST else {epoch}

    def situation(self, assembly: TokenAssembly) -> Situation:
        return Situation(
            prefill_has_blocks=self.prefill is not None and not self.adopted,
            offered=self.prefill_since == self.generation or self.has_heard_decode,
            adopted=self.adopted or self.local,
            started=assembly.is_started,
            lacks_first=not self.local and assembly.lacks(self.request.num_forced),
        )

    def limit(self, stage: Stage, assembly: TokenAssembly, limits: StageLimits) -> float:
        """Seconds within which there is to be news of it."""
        is_decoding = stage is Stage.DECODING
        if self.local:
            return limits.of(stage, is_computed=is_decoding, has_decode=is_decoding)
        is_computed = not assembly.lacks(self.request.num_forced)
        return limits.of(stage, is_computed=is_computed, has_decode=self.adopted)

    def side_of(self, epoch: Epoch) -> Side | None:
        if self.decode is not None and self.decode.epoch == epoch:
            return Side.DECODE
        return Side.PREFILL if self.prefill is not None and self.prefill.epoch == epoch else None

    def abort(self) -> Abort:
        """Outlaws this try, and those before it."""
        return Abort(self.request.id, self.generation)

    def admits(self, epoch: Epoch, generation: Generation) -> Side | None:
        """The side that speaks; None: an older try's, or nobody of this one. A redirect does not outlaw what P sent."""
        side = self.side_of(epoch)
        oldest = self.prefill_since if side is Side.PREFILL else self.generation
        return side if side is not None and oldest <= generation <= self.generation else None
