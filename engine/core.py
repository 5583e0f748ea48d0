"""One engine: the step (``engine.stepper``), and everything that may be asked of it between two steps.

Knows sequences, blocks and when choices end. Knows no tensors (a runner computes), no threads (``engine.loop`` has one)
and no network. Every call is made on one thread. A request is known by its id from add() or reserve() until its last
choice ends, its hold is released, or it is aborted or cancelled.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from engine.block_pool import BlockPool
from engine.facts import EngineFacts
from engine.outcome import KvLike
from engine.output import StepOutput
from engine.population import Population
from engine.prefix_cache import PrefixCache
from engine.rules import FinishRules, check_request, check_room
from engine.scheduler import Scheduler, SchedulerLimits
from engine.sequence import Reservation, Track, num_blocks_for
from engine.stats import EngineStats, Meter
from engine.stepper import RunnerLike, Stepper
from proto.control import Load
from proto.errors import LocalProtocolError, Overloaded, RemoteProtocolError
from proto.hashing import BlockHasher
from proto.ids import BlockHash, BlockId, RequestId
from proto.inventory import CacheChange
from proto.request import Request

SOON_FREE_EVERY_S = 0.05
"""How old the number of soon-free blocks may be. It takes a look at many blocks, and routers hear of it less often."""


class EngineCore:
    """One engine. ``policy`` ``priority`` serves the lowest priority first, equal ones as they come; ``fcfs`` knows no
    priorities. ``max_num_queued`` bounds the fresh requests that wait.

    ``runs_ahead`` and ``on_started`` are ``engine.stepper.Stepper``'s.
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
        policy: str = "priority",
        max_num_queued: int = 512,
        runs_ahead: bool = False,
        on_started: Callable[[RequestId], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        assert hasher.block_size == facts.block_size
        assert policy in ("fcfs", "priority")
        self._facts = facts
        self._hasher = hasher
        self._uses_priority = policy == "priority"
        self._max_num_queued = max_num_queued
        self._cache = PrefixCache(BlockPool(facts.num_blocks), is_enabled=enable_prefix_caching)
        self._live = Population(self._cache, hasher)
        self._num_arrived = 0
        self._clock = clock
        self._soon_free = 0
        self._soon_free_until = -math.inf
        self._meter = Meter()
        self._stepper = Stepper(
            runner,
            kv,
            facts,
            self._live,
            Scheduler(SchedulerLimits.of(facts, enable_chunked_prefill=enable_chunked_prefill)),
            self._meter,
            runs_ahead=runs_ahead,
            on_started=on_started,
            clock=clock,
        )

    # -- the step ---------------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Whether step() may get something done. False while everything waits for blocks that holds and reservations
        have: their end, like every other call, makes it true again."""
        return self._stepper.has_work()

    def step(self) -> StepOutput:
        """Completes one batch. What the runner raises passes through; the same work is then tried again by the next."""
        return self._stepper.step()

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
        self._stepper.wake()

    def abort(self, request: RequestId, num_verified: int = 0) -> None:
        """Lets go of everything of the request, in whichever stage it is; of a reservation as ``cancel`` does. May be
        repeated; says nothing."""
        live = self._live
        for waiting in live.waiting.of(request):
            live.drop_waiting(waiting)
        for sequence in live.running_of(request):
            live.finish(sequence)
        self.release(request)
        self.cancel(request, num_verified)

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
        self._stepper.wake()

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
        self._stepper.wake()

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
        if live.waiting.has_urgent or (self._stepper.is_full and len(live.waiting) + len(live.running) > 0):
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
        self._stepper.wake()

    def cancel(self, request: RequestId, num_verified: int = 0) -> None:
        """Drops a reservation. Its first ``num_verified`` blocks are right: the full ones stay cached. May be
        repeated."""
        self._live.cancel(request, num_verified)
        self._stepper.wake()

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
            num_soon_free_blocks=self._num_soon_free(),
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
        """Nothing is known, no step is under way, and every block is free."""
        return not self._live.known and self._cache.num_free == self._cache.num_blocks

    def check_integrity(self) -> None:
        """Recomputes from scratch what every count and index should be. For tests; takes time."""
        self._live.check_integrity()
        num_seats = self._live.num_running_seats + self._live.num_reserved_seats
        assert num_seats <= self._facts.max_num_seqs

    # -- helpers ----------------------------------------------------------------------------------------------------

    def _num_soon_free(self) -> int:
        now = self._clock()
        if now >= self._soon_free_until:
            self._soon_free, self._soon_free_until = self._live.count_soon_free(), now + SOON_FREE_EVERY_S
        return min(self._soon_free, self._cache.num_blocks - self._cache.num_free)

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
        """Says when, by the usual length of what waits, one place will be free."""
        waiting, rate = self._live.waiting, self._meter.prompt_tokens_per_s
        place_s = waiting.num_tokens / max(1, len(waiting)) / rate if rate > 0 else 0.0
        return Overloaded(f"{len(waiting)} requests wait on this worker already.", retry_after_s=max(1.0, place_s))
