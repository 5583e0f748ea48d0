"""The step: schedule, run, apply; and everything that may be asked of an engine between two steps.

Knows sequences, blocks and when choices end. Knows no tensors (a runner computes), no time but its own durations, no
threads (``engine.loop`` has one) and no network. Every call is made on one thread. A request is known by its id from
add() or reserve() until its last choice ends, its hold is released, or it is aborted or cancelled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.batch import Row, StepBatch, StepResult
from engine.block_pool import BlockPool
from engine.facts import EngineFacts
from engine.outcome import KvLike, Outcome
from engine.output import StepOutput
from engine.population import Population
from engine.prefix_cache import PrefixCache
from engine.rules import FinishRules, check_request, check_room
from engine.scheduler import Schedule, Scheduler, SchedulerLimits
from engine.sequence import Reservation, Running, Track, num_blocks_for
from engine.stats import EngineStats, Meter
from proto.control import Load
from proto.errors import LocalProtocolError, Overloaded, RemoteProtocolError
from proto.hashing import BlockHasher
from proto.ids import BlockHash, BlockId, RequestId
from proto.inventory import CacheChange
from proto.request import Request


class RunnerLike(Protocol):
    """Computes a batch; see ``engine.batch`` for what it is given and gives back."""

    def run(self, batch: StepBatch) -> StepResult: ...


@dataclass(frozen=True, slots=True)
class _Step:
    """A decision with its blocks taken, ready to run. ``copied``: whose blocks the ``copies`` are."""

    began: float
    schedule: Schedule
    rows: tuple[tuple[Running, int], ...]
    copies: tuple[tuple[BlockId, BlockId], ...]
    copied: tuple[Running, ...]
    started: tuple[RequestId, ...]


class EngineCore:
    """One engine. ``policy`` is ``fcfs`` or ``priority``; ``max_num_queued`` bounds the fresh requests that wait.

    ``on_started`` is called with a request's id just before the step that computes its first chunk runs.
    """

    def __init__(
        self,
        runner: RunnerLike,
        kv: KvLike,
        facts: EngineFacts,
        hasher: BlockHasher,
        *,
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        policy: str = "fcfs",
        max_num_queued: int = 512,
        on_started: Callable[[RequestId], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        assert hasher.block_size == facts.block_size
        assert policy in ("fcfs", "priority")
        self._runner = runner
        self._kv = kv
        self._facts = facts
        self._hasher = hasher
        self._uses_priority = policy == "priority"
        self._max_num_queued = max_num_queued
        self._on_started = on_started
        self._clock = clock
        self._cache = PrefixCache(BlockPool(facts.num_blocks), is_enabled=enable_prefix_caching)
        self._live = Population(self._cache, hasher)
        self._scheduler = Scheduler(SchedulerLimits.of(facts, enable_chunked_prefill=enable_chunked_prefill))
        self._num_arrived = 0
        self._meter = Meter()
        # What the last step found: somebody left out for want of blocks or a seat; nothing at all that it could do.
        self._is_full = False
        self._is_stuck = False

    # -- the step ---------------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Whether step() may get something done. False while everything waits for blocks that holds and reservations
        have: their end, like every other call, makes it true again."""
        return not self._is_stuck and (len(self._live.running) > 0 or len(self._live.waiting) > 0)

    def step(self) -> StepOutput:
        """Computes one batch. What the runner raises passes through; the same work is then tried again by the next."""
        step = self._schedule()
        result = self._run(step)
        return self._apply(step, result)

    def _schedule(self) -> _Step:
        began = self._clock()
        live, cache = self._live, self._cache
        schedule = self._scheduler.decide(live.running, live.waiting, cache, live.num_reserved_seats)
        self._is_full, self._is_stuck = schedule.is_full, schedule.is_empty
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

    def _run(self, step: _Step) -> StepResult:
        try:
            if self._on_started is not None:
                for request in step.started:
                    self._on_started(request)
            if not step.rows:
                return ()
            return self._runner.run(StepBatch(tuple(self._row(*row) for row in step.rows), step.copies))
        except BaseException:
            # Chunks are simply computed again, but nobody will make these copies again.
            for sequence in step.copied:
                self._live.preempt(sequence)
            raise

    def _row(self, sequence: Running, num_tokens: int) -> Row:
        track, start = sequence.track, sequence.num_computed
        stop = start + num_tokens
        return Row(
            tokens=track.tokens(start, stop),
            start=start,
            block_table=sequence.blocks[: num_blocks_for(stop, self._facts.block_size)],
            samples=track.sample_specs() if stop == len(track) else (),
        )

    def _apply(self, step: _Step, result: StepResult) -> StepOutput:
        num_cached = tuple(self._live.known[request].num_cached for request in step.started)
        outcome = Outcome(self._live, self._kv, self._facts.block_size)
        for (sequence, num_tokens), sampled in zip(step.rows, result, strict=True):
            outcome.apply(sequence, num_tokens, sampled)
        duration_s = self._clock() - step.began
        preempted = tuple(victim.track.id for victim in step.schedule.preemptions)
        self._meter.num_preemptions += len(preempted)
        if step.rows:
            self._meter.count_step(outcome.num_prompt_tokens, len(outcome.tokens), duration_s)
        return StepOutput(
            tokens=tuple(outcome.tokens),
            started=step.started,
            filled=tuple(outcome.filled),
            preempted=preempted,
            num_tokens=sum(num_tokens for _, num_tokens in step.rows),
            duration_s=duration_s,
            num_cached=num_cached,
        )

    # -- requests ---------------------------------------------------------------------------------------------------

    def add(self, request: Request, *, hold: bool = False) -> None:
        """Takes a request in. ``hold``: compute the prompt and the first token of every choice, then keep the blocks
        until release(); otherwise generate to the end. ``request.forced`` resumes; held, only where n is 1.

        Raises InvalidRequest if it can never be served, Overloaded if too many wait (a resume is never turned away),
        LocalProtocolError for an id that is here already. A choice whose forced tokens end it has no more output.
        """
        if request.id in self._live.known:
            raise LocalProtocolError(f"request {request.id} is on this engine already")
        check_request(request, self._facts, hold=hold)
        if not request.is_resumed and self._live.waiting.num_new >= self._max_num_queued:
            raise self._overloaded()
        tracks = [self._new_track(request, is_held=hold)]
        if request.is_resumed:
            if hold and request.params.n > 1:
                raise LocalProtocolError("choices that have gone different ways have no prompt in common to hold")
            tracks = [track for track in tracks[0].resumed() if not track.is_finished]
        if tracks:
            self._live.introduce(request.id)
        for track in tracks:
            self._live.enqueue(track, is_urgent=request.is_resumed)
        self._is_stuck = False

    def abort(self, request: RequestId) -> None:
        """Lets go of everything of the request, in whichever stage it is. May be repeated; says nothing."""
        live = self._live
        for waiting in live.waiting.of(request):
            live.drop_waiting(waiting)
        for sequence in live.running_of(request):
            live.finish(sequence)
        self.release(request)
        self.cancel(request)

    def finish_choice(self, request: RequestId, choice: int) -> None:
        """Nobody wants more of this choice. May be repeated. A held prompt's choices go on: they end elsewhere."""
        live = self._live
        for waiting in live.waiting.of(request):
            if waiting.track.gives_up(choice):
                live.drop_waiting(waiting)
        for sequence in live.running_of(request):
            if sequence.track.gives_up(choice):
                live.finish(sequence)
        if request in live.reserved:
            live.reserved[request].unwanted.add(choice)
        self._is_stuck = False

    def num_cached(self, request: RequestId) -> int:
        """Prompt tokens of a request on this engine that the prefix cache served; 0 before it starts, and when it has
        gone (``StepOutput.num_cached`` has it too)."""
        known = self._live.known.get(request)
        return 0 if known is None else known.num_cached

    # -- prompts computed here for elsewhere ------------------------------------------------------------------------

    def block_table(self, request: RequestId) -> tuple[BlockId, ...]:
        """The blocks of a held prompt, in its order. Raises LocalProtocolError if it is not (or no longer) held."""
        held = self._live.held.get(request)
        if held is None:
            raise LocalProtocolError(f"request {request} is not held")
        return held.blocks

    def release(self, request: RequestId) -> None:
        """Ends a hold: full blocks stay in the prefix cache, unpinned. May be repeated."""
        self._live.release(request)
        self._is_stuck = False

    # -- prompts computed elsewhere for here ------------------------------------------------------------------------

    def reserve(
        self, request: RequestId, hashes: Sequence[BlockHash], num_tokens: int, num_choices: int
    ) -> Reservation | None:
        """Room for a prompt of ``num_tokens`` (``hashes``: one per block) and the first block each choice generates.

        None while it is full: blocks or seats are lacking, or work that is here already waits for them. Raises
        InvalidRequest if it never fits, RemoteProtocolError if the hashes do not go with the number of tokens.
        """
        live, facts = self._live, self._facts
        if request in live.known:
            raise LocalProtocolError(f"request {request} is on this engine already")
        if num_tokens < 1 or num_choices < 1 or len(hashes) != num_blocks_for(num_tokens, facts.block_size):
            raise RemoteProtocolError(f"{len(hashes)} block hashes for {num_tokens} tokens and {num_choices} choices")
        check_room(num_tokens, num_choices, facts)
        if live.waiting.has_urgent or (self._is_full and len(live.waiting) + len(live.running) > 0):
            return None
        if live.num_running_seats + live.num_reserved_seats + num_choices > facts.max_num_seqs:
            return None
        matched = self._cache.match(hashes[: num_tokens // facts.block_size])
        num_new_blocks = len(hashes) - len(matched) + num_choices
        if num_new_blocks + self._cache.cost_of_pinning(matched) + live.num_growing > self._cache.num_free:
            return None
        return live.reserve(request, matched, hashes, num_tokens, num_choices)

    def adopt(self, request: Request, first: Sequence[int]) -> None:
        """Every block of the reservation is verified: its choices run from the next step. ``first`` is the token that
        each of them has already, which is not emitted again.

        Raises LocalProtocolError without a reservation, RemoteProtocolError if it was made for another prompt, and
        InvalidRequest if the request can never be finished here; the reservation then stays, to be cancelled.
        """
        room = self._live.reserved.get(request.id)
        if room is None:
            raise LocalProtocolError(f"no room is reserved for request {request.id}")
        check_request(request, self._facts)
        prompt = self._new_track(request)
        if request.is_resumed:
            if request.params.n > 1:
                raise RemoteProtocolError("choices that have gone different ways cannot be handed over as one prompt")
            [prompt] = prompt.resumed()
        num_tokens = len(prompt)
        hashes = self._hasher.all_blocks(prompt.tokens(0, num_tokens), request.cache_salt)
        if len(first) != request.params.n or num_tokens != room.num_tokens or tuple(hashes) != room.hashes:
            raise RemoteProtocolError(f"request {request.id} is not the one whose blocks were offered")
        if self._cache.is_enabled:
            prompt.hashes = hashes[: num_tokens // self._facts.block_size]
        forks = [prompt.fork(choice) for choice in range(request.params.n)]
        endings = [fork.append(token) for fork, token in zip(forks, first, strict=True)]
        wanted = zip(forks, endings, strict=True)
        self._live.adopt(
            room, [fork for fork, ending in wanted if ending is None and fork.choices[0] not in room.unwanted]
        )
        self._is_stuck = False

    def cancel(self, request: RequestId, num_verified: int = 0) -> None:
        """Drops a reservation. Its first ``num_verified`` blocks are right: the full ones stay cached. May be
        repeated."""
        self._live.cancel(request, num_verified)
        self._is_stuck = False

    # -- what it looks like from outside ----------------------------------------------------------------------------

    def load(self) -> Load:
        """Waiting tokens are prompt tokens yet to compute, those of running prompts included."""
        live = self._live
        num_to_compute = sum(sequence.num_remaining for sequence in live.running if sequence.is_prefilling)
        return Load(
            num_running=live.num_running_seats,
            num_waiting=len(live.waiting),
            num_waiting_tokens=live.waiting.num_tokens + num_to_compute,
            num_free_blocks=self._cache.num_free,
            num_blocks=self._cache.num_blocks,
            tokens_per_s=self._meter.prompt_tokens_per_s,
        )

    @property
    def stats(self) -> EngineStats:
        live = self._live
        return self._meter.snapshot(
            num_running=live.num_running_seats,
            num_waiting=len(live.waiting),
            num_held=len(live.held),
            num_reserved=len(live.reserved),
            num_free_blocks=self._cache.num_free,
            num_blocks=self._cache.num_blocks,
        )

    def take_cache_events(self) -> list[CacheChange]:
        """What changed in the inventory since the last call, to be applied in order."""
        return self._cache.take_events()

    def cached_hashes(self) -> list[BlockHash]:
        """The inventory: every block that can be matched."""
        return self._cache.hashes()

    def clear_cache(self) -> None:
        """Forgets all cached content; blocks in use stay in use."""
        self._cache.clear()

    def is_idle(self) -> bool:
        """Nothing is known, and every block is free."""
        return not self._live.known and self._cache.num_free == self._cache.num_blocks

    def check_integrity(self) -> None:
        """Recomputes from scratch what every count and index should be. For tests; takes time."""
        self._live.check_integrity()
        num_seats = self._live.num_running_seats + self._live.num_reserved_seats
        assert num_seats <= self._facts.max_num_seqs

    # -- helpers ----------------------------------------------------------------------------------------------------

    def _new_track(self, request: Request, *, is_held: bool = False) -> Track:
        self._num_arrived += 1
        return Track(
            request=request,
            rules=FinishRules.of(request, self._facts),
            priority=request.priority if self._uses_priority else 0,
            arrival=self._num_arrived,
            choices=tuple(range(request.params.n)),
            is_held=is_held,
        )

    def _overloaded(self) -> Overloaded:
        rate = self._meter.prompt_tokens_per_s
        return Overloaded(
            f"{len(self._live.waiting)} requests wait on this worker already.",
            retry_after_s=max(1.0, self._live.waiting.num_tokens / rate) if rate > 0 else 1.0,
        )
