"""The step: schedule → run → apply; and on a device that computes by itself, the next one while this one runs.

    step()      schedule 1  submit 1 ┐ schedule 2  submit 2 ┐              wait for 1, apply 1
    step()                           │ schedule 3  submit 3 │ ┐            wait for 2, apply 2
    device                           └─ 1 ────────────────▶ └─│ 2 ───────────────▶ └─ 3 ─────▶

Running ahead, a decode's next token is not known when its next row is made: the row follows a draw of the step before,
and the device puts the token in its place. Only steps whose outcome leaves nothing else to decide are run ahead of:
decodes of one choice each. What else a token can bring is its sequence's end (EOS, a stop token): then the row that was
made too much is dropped, and the sequence's blocks are free once the step that still computes it is done
(``Population.leaving``). An end by length is known beforehand. Whatever needs the results first waits for them:
admissions, preemptions, prompts, forks, holds, copies.

Knows sequences and blocks; knows no tensors (a runner computes), and no time but its own durations.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from engine.batch import Row, Sampled, StepBatch, StepResult
from engine.facts import EngineFacts
from engine.outcome import KvLike, Outcome
from engine.output import StepOutput
from engine.population import Population
from engine.scheduler import Schedule, Scheduler
from engine.sequence import Running, num_blocks_for
from engine.stats import Meter
from proto.errors import LocalFault
from proto.ids import BlockId, RequestId

MAX_FAILED_IN_A_ROW = 16
"""Requests whose numbers were not finite, with none between them whose were. More: it is not the requests."""

UNKNOWN = 0
"""Stands for a token that a row will have from the step before."""


class Pending(Protocol):
    """A step that was submitted."""

    def result(self) -> StepResult:
        """Waits for it, if need be. Called once. Raises what went wrong in it."""


class RunnerLike(Protocol):
    """Computes batches in the order in which they are submitted; ``engine.batch`` says what it is given and gives."""

    def submit(self, batch: StepBatch) -> Pending: ...


@dataclass(frozen=True, slots=True)
class _Step:
    """A decision with its blocks taken, ready to run. ``copied``: whose blocks the ``copies`` are."""

    began: float
    schedule: Schedule
    rows: tuple[tuple[Running, int], ...]
    copies: tuple[tuple[BlockId, BlockId], ...] = ()
    copied: tuple[Running, ...] = ()
    started: tuple[RequestId, ...] = ()


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A step that is being computed. ``pending`` is None where there is nothing to compute."""

    step: _Step
    pending: Pending | None


class Stepper:
    """Steps one engine's population. ``runs_ahead``: as above; else a step is over before the next is scheduled.

    ``on_started`` is called with a request's id just before the step that computes its first chunk runs.
    """

    def __init__(
        self,
        runner: RunnerLike,
        kv: KvLike,
        facts: EngineFacts,
        live: Population,
        scheduler: Scheduler,
        meter: Meter,
        *,
        runs_ahead: bool = False,
        on_started: Callable[[RequestId], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runner = runner
        self._kv = kv
        self._facts = facts
        self._live = live
        self._scheduler = scheduler
        self._meter = meter
        self._runs_ahead = runs_ahead
        self._on_started = on_started
        self._clock = clock
        self._under_way: _UnderWay | None = None
        self._last_end = clock()
        self._num_failed_in_a_row = 0
        # What the last decision found: somebody left out for want of blocks or a seat; nothing at all that it could do.
        self.is_full = False
        self._is_stuck = False

    def wake(self) -> None:
        """Something has changed: there may be work again."""
        self._is_stuck = False

    def has_work(self) -> bool:
        """Whether step() may get something done. False while everything waits for blocks that holds and reservations
        have, until wake()."""
        if self._under_way is not None:
            return True
        return not self._is_stuck and (len(self._live.running) > 0 or len(self._live.waiting) > 0)

    def step(self) -> StepOutput:
        """Completes one batch. What the runner raises passes through; the same work is then tried again by the next.

        Raises LocalFault where the numbers of request after request are not finite.
        """
        if self._under_way is None:
            self._under_way = self._submit(self._schedule())
        current = self._under_way
        following = self._submit_ahead(current.step) if self._runs_ahead else None
        self._under_way = following
        try:
            result = current.pending.result() if current.pending is not None else ()
        except BaseException:
            self._fail(current.step)
            raise
        return self._apply(current.step, result)

    # -- schedule ---------------------------------------------------------------------------------------------------

    def _schedule(self) -> _Step:
        began = self._clock()
        live, cache = self._live, self._live.cache
        schedule = self._scheduler.decide(live.running, live.waiting, cache, live.num_reserved_seats)
        self.is_full, self._is_stuck = schedule.is_full, schedule.is_empty
        for victim in schedule.preemptions:
            live.preempt(victim)
        for admission in schedule.admissions:
            cache.pin(admission.matched)
        rows: list[tuple[Running, int]] = []
        copies: list[tuple[BlockId, BlockId]] = []
        for chunk in schedule.chunks:
            chunk.sequence.blocks += cache.allocate(chunk.num_new_blocks)
            if chunk.copies_last:
                copies.append(live.unshare(chunk.sequence))
            rows.append((chunk.sequence, chunk.num_tokens))
        copied = tuple(chunk.sequence for chunk in schedule.chunks if chunk.copies_last)
        started: list[RequestId] = []
        for admission in schedule.admissions:
            sequence = live.admit(admission)
            rows.append((sequence, admission.num_tokens))
            if self._note_start(sequence):
                started.append(sequence.track.id)
        return _Step(began, schedule, tuple(rows), tuple(copies), copied, tuple(started))

    def _note_start(self, sequence: Running) -> bool:
        """Whether this is the first time that any sequence of its request runs."""
        known = self._live.known[sequence.track.id]
        if known.is_started:
            return False
        known.is_started = True
        known.num_cached = min(sequence.num_computed, sequence.track.num_prompt)
        self._meter.count_match(sequence.track.num_prompt, known.num_cached)
        return True

    def _submit_ahead(self, current: _Step) -> _UnderWay | None:
        """The step after ``current``, which is being computed; None where its results are needed first."""
        if not current.rows or not all(_is_plain(*row) for row in current.rows):
            return None
        began = self._clock()
        live = self._live
        going_on = [sequence for sequence in live.running if not sequence.ends_by_length]
        num_ending = len(live.running) - len(going_on)
        schedule = self._scheduler.decide(going_on, live.waiting, live.cache, live.num_reserved_seats + num_ending)
        if schedule.preemptions or schedule.admissions or not schedule.chunks:
            return None
        if any(chunk.copies_last or not _is_plain(chunk.sequence, chunk.num_tokens) for chunk in schedule.chunks):
            return None
        self.is_full = schedule.is_full
        for chunk in schedule.chunks:
            chunk.sequence.blocks += live.cache.allocate(chunk.num_new_blocks)
        rows = tuple((chunk.sequence, chunk.num_tokens) for chunk in schedule.chunks)
        return self._submit(_Step(began, schedule, rows), after=current)

    # -- run --------------------------------------------------------------------------------------------------------

    def _submit(self, step: _Step, after: _Step | None = None) -> _UnderWay:
        """``after``: the step that is being computed, whose draws are one to a row."""
        try:
            if self._on_started is not None:
                for request in step.started:
                    self._on_started(request)
            draws = {} if after is None else {sequence: draw for draw, (sequence, _) in enumerate(after.rows)}
            batch = StepBatch(tuple(self._row(*row, draws) for row in step.rows), step.copies)
            pending = self._runner.submit(batch) if step.rows else None
        except BaseException:
            self._forget_copies(step)
            raise
        for sequence, num_tokens in step.rows:
            sequence.num_in_flight += num_tokens
        return _UnderWay(step, pending)

    def _row(self, sequence: Running, num_tokens: int, draws: dict[Running, int]) -> Row:
        track, start, num_unknown = sequence.track, sequence.num_scheduled, sequence.num_in_flight
        stop = start + num_tokens
        return Row(
            tokens=(UNKNOWN,) if num_unknown else track.tokens(start, stop),
            start=start,
            block_table=sequence.blocks[: num_blocks_for(stop, self._facts.block_size)],
            samples=track.sample_specs(num_unknown) if stop == len(track) + num_unknown else (),
            follows=draws[sequence] if num_unknown else None,
        )

    def _fail(self, step: _Step) -> None:
        """``step`` came to nothing, and so does one that was submitted after it."""
        following, self._under_way = self._under_way, None
        if following is not None and following.pending is not None:
            with contextlib.suppress(Exception):  # It was computed from what the failed one left.
                following.pending.result()
        for failed in (step,) if following is None else (step, following.step):
            for sequence, num_tokens in failed.rows:
                self._live.land(sequence, num_tokens)
        self._forget_copies(step)

    def _forget_copies(self, step: _Step) -> None:
        """Chunks are simply computed again, but nobody will make a failed step's copies again."""
        for sequence in step.copied:
            if sequence in self._live.running:
                self._live.preempt(sequence)

    # -- apply ------------------------------------------------------------------------------------------------------

    def _apply(self, step: _Step, result: StepResult) -> StepOutput:
        num_cached = tuple(self._live.known[request].num_cached for request in step.started)
        outcome = Outcome(self._live, self._kv, self._facts.block_size)
        num_tokens = sum(self._apply_row(outcome, row, drawn) for row, drawn in zip(step.rows, result, strict=True))
        end = self._clock()
        duration_s = end - max(step.began, self._last_end)
        self._last_end = end
        preempted = tuple(victim.track.id for victim in step.schedule.preemptions)
        self._meter.num_preemptions += len(preempted)
        if step.rows:
            self._meter.count_step(outcome.num_prompt_tokens, len(outcome.tokens), duration_s)
        return StepOutput(
            tokens=tuple(outcome.tokens),
            started=step.started,
            filled=tuple(outcome.filled),
            preempted=preempted,
            failed=tuple(outcome.failed),
            num_tokens=num_tokens,
            duration_s=duration_s,
            num_cached=num_cached,
        )

    def _apply_row(self, outcome: Outcome, row: tuple[Running, int], sampled: tuple[Sampled, ...] | None) -> int:
        """How many tokens were computed: none for a sequence that has ended meanwhile."""
        sequence, num_tokens = row
        if not self._live.land(sequence, num_tokens):
            return 0
        if sampled is None:
            self._fail_request(outcome, sequence)
            return num_tokens
        if sampled:
            self._num_failed_in_a_row = 0
        outcome.apply(sequence, num_tokens, sampled)
        return num_tokens

    def _fail_request(self, outcome: Outcome, sequence: Running) -> None:
        self._num_failed_in_a_row += 1
        self._meter.num_failed += 1
        if self._num_failed_in_a_row > MAX_FAILED_IN_A_ROW:
            raise LocalFault(
                f"The model gave logits that are not finite for {self._num_failed_in_a_row} requests in a row: "
                "damaged weights, or values too large for the model's type."
            )
        outcome.fail(sequence)


def _is_plain(sequence: Running, num_tokens: int) -> bool:
    """Whether a row of ``num_tokens`` brings the next token of one choice, and nothing else to decide."""
    track = sequence.track
    return num_tokens == sequence.num_remaining == 1 and len(track.choices) == 1 and not track.is_held
