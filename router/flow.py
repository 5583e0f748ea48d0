"""Every request in the router: admitted, placed, fed by its workers' messages, and ended.

A message names a request, so it goes to that life and to no other; a slow client holds up nobody. Leases of what lives
hold on workers are renewed from one timer. Knows the lives and the fleet's view; ``life`` knows what a message means.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from proto.control import Failed, FromRouter, FromWorker, Progress, Rejected, Renew, Tokens
from proto.errors import InvalidRequest, LocalFault, TandemError, Unavailable
from proto.hashing import BlockHasher
from proto.ids import BlockHash, Epoch, RequestId, WorkerId
from proto.lifecycle import Stage
from proto.request import Request, TokenOut
from router.admission import Admission
from router.announced import Announced
from router.attempt import SILENCE, Listener, Rules
from router.contract import NewRequest, StageTimes
from router.life import Life
from router.pace import Pace
from router.policy import NO_GOALS, Ask, Candidate, Decision, Goals, View, Way, Weights, choose
from router.prefix_index import PrefixIndex
from router.timers import Cancellable, LoopTimers, Timers

log = logging.getLogger(__name__)


class Fleet(Protocol):
    """The workers as the flow needs them (``registry``)."""

    @property
    def layout(self) -> str:
        """The KV layout that new requests are for; empty before the first worker came up."""

    def view(self, layout: str) -> View:
        """The workers for requests of ``layout``."""

    def hasher(self, layout: str) -> BlockHasher:
        """Names blocks of ``layout``. Raises NoWorker while no worker of it was ever seen."""

    def send(self, epoch: Epoch, message: FromRouter) -> None:
        """Never blocks; dropped when the worker is gone."""

    def mark_full(self, epoch: Epoch, seconds: float) -> None: ...

    def mark_draining(self, epoch: Epoch) -> None: ...

    def note_fault(self, epoch: Epoch) -> None:
        """A try failed there."""

    def note_success(self, epoch: Epoch) -> None: ...


@dataclass(frozen=True, slots=True)
class _Prompt:
    """``layout``: of the model that a request's tokens are for, whatever is served now; ``hashes``: of its blocks."""

    layout: str
    hashes: Sequence[BlockHash]


class RequestStream:
    """A life as its client reads it; see ``contract.RequestStreamLike``."""

    def __init__(self, life: Life) -> None:
        self._life = life

    @property
    def id(self) -> RequestId:
        return self._life.id

    @property
    def timings(self) -> StageTimes:
        return self._life.journal.times

    @property
    def num_cached(self) -> int:
        return self._life.journal.num_cached

    @property
    def num_bytes_moved(self) -> int:
        return self._life.journal.num_bytes_moved

    @property
    def prefill_worker(self) -> WorkerId | None:
        return self._life.journal.prefill_worker

    @property
    def decode_worker(self) -> WorkerId | None:
        return self._life.journal.decode_worker

    @property
    def is_refused(self) -> bool:
        """Whether it waits for a decode worker with room for its blocks."""
        return self._life.is_refused

    def __aiter__(self) -> AsyncIterator[list[TokenOut]]:
        return self

    async def __anext__(self) -> list[TokenOut]:
        return await self._life.buffer.take()

    def stop_choice(self, choice: int) -> None:
        self._life.stop_choice(choice)

    def fail(self, error: TandemError) -> None:
        self._life.fail(error)

    async def aclose(self) -> None:
        self._life.close()


class Flow:
    """``start`` requests once ``open``; feed it ``message_came``, ``worker_up`` and ``worker_down``. One event loop."""

    def __init__(
        self,
        fleet: Fleet,
        index: PrefixIndex,
        admission: Admission,
        rules: Rules,
        weights: Weights,
        listener: Listener,
        timers: Timers | None = None,
        goals: Goals = NO_GOALS,
    ) -> None:
        self._fleet = fleet
        self._index = index
        self._admission = admission
        self._rules = rules
        self._weights = weights
        self._goals = goals
        self._pace = Pace()
        self._announced = Announced()
        self._listener = listener
        self._timers = timers or LoopTimers()
        self._lives: dict[RequestId, Life] = {}
        self._prompts: dict[RequestId, _Prompt] = {}
        self._canaries: set[RequestId] = set()
        self._last_adopted_at = -math.inf
        self._last_placed_at = -math.inf
        self._turn = 0
        self._renewal: Cancellable | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_inflight(self) -> int:
        """Clients' requests; a canary is none."""
        return len(self._lives.keys() - self._canaries)

    @property
    def num_waiting(self) -> int:
        """Requests that lost their worker and have found no other yet."""
        return sum(life.is_waiting for life in self._lives.values())

    @property
    def last_adopted_at(self) -> float:
        """When a decode worker last had all blocks of a request that was no canary; -inf: never."""
        return self._last_adopted_at

    async def start(self, new: NewRequest) -> RequestStream:
        """Admits and places a request. Raises Overloaded, NoWorker or Unavailable, and then nothing is left of it; and
        InvalidRequest for a priority that nobody would heed."""
        try:
            self._check_priority(new)
            return self._begin(self._admission.admit(new), new, self._listener)
        except TandemError as error:
            self._listener.turned_away(error)
            raise

    async def start_canary(self, new: NewRequest) -> RequestStream:
        """Like ``start``, always through a prefill worker, and told to nobody."""
        request = self._admission.admit(new)
        self._canaries.add(request.id)
        return self._begin(request, new, SILENCE)

    def _begin(self, request: Request, new: NewRequest, listener: Listener) -> RequestStream:
        life = Life(request, new.label, self._rules, self, listener, self._timers, is_later=new.is_later)
        try:
            layout = new.layout or self._fleet.layout
            hashes = self._fleet.hasher(layout).full_blocks(request.prompt, request.cache_salt)
            self._prompts[request.id] = _Prompt(layout, hashes)
            self._lives[request.id] = life
            life.begin(new.spent_s)
        except BaseException:
            if life.stage is Stage.RECEIVED:
                self._forget(request.id)
            else:  # workers may have heard of it, and its clocks run
                life.fail(LocalFault("the request could not be sent to its workers"))
            raise
        self._idle.clear()
        if self._renewal is None:
            self._renewal = self._timers.call_later(self._rules.lease_s / 3, self._renew)
        return RequestStream(life)

    # From the fleet.

    def message_came(self, epoch: Epoch, message: FromWorker) -> None:
        match message:
            case Tokens():
                self._tokens_came(epoch, message)
            case Progress():
                self._announced.progressed(message.request, epoch, message.stage)
                if life := self._life(message.request):
                    life.progress_came(epoch, message)
                    if message.stage is Stage.ADOPTED and message.request not in self._canaries:
                        self._last_adopted_at = self._timers.time()
            case Rejected():
                if life := self._life(message.request):
                    life.rejected(epoch, message)
            case Failed():
                if life := self._life(message.request):
                    life.failed(epoch, message)
            case _:
                self._listener.refused("malformed")
                log.error("%s sent %s, which is not for a request", epoch, type(message).__name__)

    def worker_up(self, epoch: Epoch) -> None:
        """Requests that wait for a worker try again."""
        for life in list(self._lives.values()):
            life.wake()

    def worker_back(self, epoch: Epoch) -> None:
        """Its stream broke for a moment: those it works for go on from where they are. It is told which they are, since
        it lets go of the others."""
        for life in list(self._lives.values()):
            life.worker_back(epoch)
            life.wake()
        if wanted := self._held().get(epoch):
            self._fleet.send(epoch, Renew(tuple(wanted), self._rules.lease_s))

    def worker_down(self, epoch: Epoch) -> None:
        self._pace.gone(epoch)
        for life in list(self._lives.values()):
            life.worker_lost(epoch)

    # The end.

    async def drain(self, timeout_s: float) -> None:
        """Admits nothing new, and waits until the requests inside have ended, or fails those that have not in time."""
        self._admission.close()
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("%d requests did not end within %g s", self.num_inflight, timeout_s)
        self.close()

    def close(self) -> None:
        """Fails every request that is left. Idempotent."""
        self._admission.close()
        for life in list(self._lives.values()):
            life.fail(Unavailable("the router is shutting down", stage=life.stage.value))
        if self._renewal is not None:
            self._renewal.cancel()
            self._renewal = None

    # For the lives (``attempt.Dispatcher``).

    def place(
        self, request: Request, way: Way, avoid: frozenset[Epoch], numerics: str, *, is_new: bool = False
    ) -> Decision:
        self._turn += 1
        prompt = self._prompts[request.id]
        hashes = prompt.hashes
        if request.is_resumed:
            hashes = self._fleet.hasher(prompt.layout).full_blocks(request.prefix, request.cache_salt)
        ask = Ask(
            num_tokens=len(request.prefix),
            num_choices=request.params.n,
            matches=self._index.match(hashes),
            way=way,
            turn=self._turn,
            avoid=avoid,
            numerics=numerics,
            is_new=is_new and request.id not in self._canaries,
            must_travel=request.id in self._canaries,
            itl_s=self._pace.itl_s,
            output_tokens=self._pace.output_tokens,
            announced=self._announced.before(request.id),
        )
        view = self._fleet.view(prompt.layout)
        decision = choose(view, ask, self._weights, self._goals)
        if decision.local:
            self._announced.forget(request.id)  # its place is in the decode worker's own queue
        else:
            self._announced.place(request.id, decision.decode.epoch, ask.num_uncached(decision.decode, view.block_size))
        self._last_placed_at = self._timers.time()
        return decision

    def had_worker_lately(self) -> bool:
        return self._timers.time() - self._last_placed_at < self._rules.patience_s

    def send(self, worker: Candidate, message: FromRouter) -> None:
        self._fleet.send(worker.epoch, message)

    def mark_full(self, epoch: Epoch, seconds: float) -> None:
        self._fleet.mark_full(epoch, seconds)

    def mark_draining(self, epoch: Epoch) -> None:
        self._fleet.mark_draining(epoch)

    def failed_on(self, epoch: Epoch) -> None:
        self._fleet.note_fault(epoch)

    def served_by(self, epoch: Epoch) -> None:
        self._fleet.note_success(epoch)

    def ended(self, request: RequestId) -> None:
        life = self._lives[request]
        for _ in range(life.assembly.num_conflicts):
            self._listener.refused("conflict")
        if life.stage is Stage.FINISHED and request not in self._canaries:
            self._pace.complete(sum(life.assembly.positions()) / life.request.params.n)
        self._forget(request)

    # Small steps.

    def _check_priority(self, new: NewRequest) -> None:
        if new.priority and self._fleet.view(new.layout or self._fleet.layout).ignores_priority:
            raise InvalidRequest(
                f"priority is {new.priority}, but this deployment serves requests as they come "
                "(--scheduling-policy fcfs): it must be 0.",
                param="priority",
            )

    def _life(self, request: RequestId) -> Life | None:
        life = self._lives.get(request)
        if life is None:
            self._listener.refused("unknown")
        return life

    def _tokens_came(self, epoch: Epoch, message: Tokens) -> None:
        """One step's tokens, sorted by request: each life hears once."""
        by_request: dict[RequestId, list[TokenOut]] = defaultdict(list)
        for out in message.tokens:
            by_request[out.request].append(out)
        for request, generation in message.generation_of:
            if (tokens := by_request.get(request)) and (life := self._life(request)):
                self._pace.heard(epoch, request, self._timers.time())
                life.tokens_came(epoch, generation, tokens)

    def _renew(self) -> None:
        """Every worker keeps what it holds for live requests; what is not named runs out."""
        self._renewal = None
        for epoch, requests in self._held().items():
            self._fleet.send(epoch, Renew(tuple(requests), self._rules.lease_s))
        if self._lives:
            self._renewal = self._timers.call_later(self._rules.lease_s / 3, self._renew)

    def _held(self) -> dict[Epoch, list[RequestId]]:
        """What each worker has for living requests."""
        held: dict[Epoch, list[RequestId]] = defaultdict(list)
        for life in self._lives.values():
            for worker in life.current.holders():
                held[worker.epoch].append(life.id)
        return held

    def _forget(self, request: RequestId) -> None:
        self._lives.pop(request, None)
        self._prompts.pop(request, None)
        self._canaries.discard(request)
        self._pace.forget(request)
        self._announced.forget(request)
        self._admission.leave(request)
        if not self._lives:
            self._idle.set()
