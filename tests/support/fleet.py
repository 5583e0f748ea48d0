"""A fleet of scripted workers in one process: what the flow sends is recorded, and tests answer as the workers."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Callable, Sequence

from proto.control import (
    Abort,
    Attach,
    FromRouter,
    Load,
    Prefill,
    Progress,
    Redirect,
    Rejected,
    RejectReason,
    Role,
    Tokens,
)
from proto.errors import NoWorker, TandemError
from proto.hashing import BlockHasher
from proto.ids import Epoch, Generation, RequestId, WorkerId
from proto.lifecycle import Stage
from proto.request import FinishReason, SamplingParams, TokenOut
from router.admission import Admission
from router.attempt import RequestEnd, Rules
from router.contract import NewRequest
from router.deadlines import StageLimits
from router.flow import Flow, RequestStream
from router.policy import NO_GOALS, Candidate, Goals, View, Weights
from router.prefix_index import PrefixIndex
from router.recovery import Remedy
from router.stages import StageChange

BLOCK_SIZE = 4
LAYOUT = "layout-a"


def candidate(name: str, role: Role, **changes: object) -> Candidate:
    made = Candidate(
        worker=WorkerId(name),
        epoch=Epoch(f"epoch-{name}"),
        role=role,
        address=f"{name}:1",
        layout=LAYOUT,
        numerics="n",
        load=Load(num_blocks=100, num_free_blocks=100, tokens_per_s=1000.0),
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


class FakeTimers:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0
        self._order = itertools.count()
        self._queue: list[tuple[float, int, FakeTimer]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], object], /) -> FakeTimer:
        timer = FakeTimer(callback)
        heapq.heappush(self._queue, (self.now + delay, next(self._order), timer))
        return timer

    def advance(self, seconds: float) -> None:
        until = self.now + seconds
        while self._queue and self._queue[0][0] <= until:
            self.now, _, timer = heapq.heappop(self._queue)
            if timer.is_live:
                timer.is_live = False
                timer.callback()
        self.now = until

    @property
    def num_live(self) -> int:
        return sum(timer.is_live for _, _, timer in self._queue)


class FakeTimer:
    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback = callback
        self.is_live = True

    def cancel(self) -> None:
        self.is_live = False


class FakeFleet:
    """The registry's side of the flow. ``sent`` lists (worker name, message) in order."""

    def __init__(self, *workers: Candidate, timers: FakeTimers) -> None:
        self.workers = {worker.epoch: worker for worker in workers}
        self.layout = LAYOUT
        self.sent: list[tuple[str, FromRouter]] = []
        self._was_seen = bool(workers)
        self.faults: list[str] = []
        self.successes: list[str] = []
        self._timers = timers
        self._full_until: dict[Epoch, float] = {}

    def view(self, layout: str) -> View:
        now = self._timers.now
        workers = tuple(
            dataclasses.replace(worker, full_for_s=max(0.0, self._full_until.get(worker.epoch, 0.0) - now))
            for worker in self.workers.values()
            if layout == self.layout or worker.layout == layout
        )
        return View(workers=workers, layout=layout, block_size=BLOCK_SIZE)

    def hasher(self, layout: str = LAYOUT) -> BlockHasher:
        if not self._was_seen:
            raise NoWorker("no worker has been seen yet")
        return BlockHasher("test" if layout == LAYOUT else layout, BLOCK_SIZE)

    def send(self, epoch: Epoch, message: FromRouter) -> None:
        if epoch in self.workers:
            self.sent.append((self.workers[epoch].worker, message))

    def mark_full(self, epoch: Epoch, seconds: float) -> None:
        self._full_until[epoch] = self._timers.now + seconds

    def mark_draining(self, epoch: Epoch) -> None:
        self.workers[epoch] = dataclasses.replace(self.workers[epoch], is_usable=False)

    def note_fault(self, epoch: Epoch) -> None:
        self.faults.append(epoch.removeprefix("epoch-"))

    def note_success(self, epoch: Epoch) -> None:
        self.successes.append(epoch.removeprefix("epoch-"))


class Recorder:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.changes: list[StageChange] = []
        self.remedies: list[Remedy] = []
        self.refusals: list[str] = []
        self.ends: list[RequestEnd] = []
        self.local: list[bool] = []
        self.turned: list[TandemError] = []
        self.num_tokens = 0

    def stage_changed(self, change: StageChange) -> None:
        self.changes.append(change)

    def placed(self, *, local: bool) -> None:
        self.local.append(local)

    def recovering(self, remedy: Remedy) -> None:
        self.remedies.append(remedy)

    def tokens_came(self, tokens: Sequence[TokenOut], at: float) -> None:
        self.num_tokens += len(tokens)

    def turned_away(self, error: TandemError) -> None:
        self.turned.append(error)

    def refused(self, reason: str) -> None:
        self.refusals.append(reason)

    def ended(self, end: RequestEnd) -> None:
        self.ends.append(end)

    def stages(self) -> list[Stage]:
        return [change.stage for change in self.changes]


class House:
    """A flow over a scripted fleet: ``House("p1", "d1", "d2")`` has one prefill and two decode workers."""

    def __init__(
        self,
        *names: str,
        threshold: int = 0,
        max_inflight: int = 100,
        goals: Goals = NO_GOALS,
        **rules: float | StageLimits,
    ) -> None:
        self.timers = FakeTimers()
        roles = {"p": Role.PREFILL, "d": Role.DECODE}
        self.fleet = FakeFleet(*(candidate(name, roles[name[0]]) for name in names), timers=self.timers)
        self.index = PrefixIndex()
        self.heard = Recorder()
        self.admission = Admission(Epoch("router"), max_inflight, draw_seed=lambda: 7)
        self.flow = Flow(
            self.fleet,
            self.index,
            self.admission,
            Rules(**rules),  # type: ignore[arg-type]
            Weights(disagg_threshold=threshold),
            self.heard,
            self.timers,
            goals,
        )

    async def start(
        self, prompt: Sequence[int] = tuple(range(10)), *, is_later: bool = False, **params: object
    ) -> RequestStream:
        params = {"max_tokens": 64, **params}
        checked = SamplingParams(**params)  # type: ignore[arg-type]
        return await self.flow.start(NewRequest(prompt=tuple(prompt), params=checked, is_later=is_later))

    # What was sent.

    def sent_to(self, name: str) -> list[FromRouter]:
        return [message for worker, message in self.fleet.sent if worker == name]

    def last_prefill(self) -> tuple[str, Prefill]:
        return next((to, m) for to, m in reversed(self.fleet.sent) if isinstance(m, Prefill))

    def last_redirect(self) -> tuple[str, Redirect]:
        return next((to, m) for to, m in reversed(self.fleet.sent) if isinstance(m, Redirect))

    def last_attach(self) -> tuple[str, Attach]:
        return next((to, m) for to, m in reversed(self.fleet.sent) if isinstance(m, Attach))

    def aborts_to(self, name: str) -> list[Abort]:
        return [message for message in self.sent_to(name) if isinstance(message, Abort)]

    # What workers say. ``generation`` 0: the last attach's.

    def says(self, name: str, *tokens: TokenOut, generation: int = 0) -> None:
        request, made = tokens[0].request, self._generation(generation)
        self.flow.message_came(Epoch(f"epoch-{name}"), Tokens(((request, made),), tokens))

    def reports(self, name: str, request: RequestId, stage: Stage, generation: int = 0, **more: int) -> None:
        news = Progress(request, self._generation(generation), stage, **more)
        self.flow.message_came(Epoch(f"epoch-{name}"), news)

    def rejects(
        self,
        name: str,
        request: RequestId,
        reason: RejectReason,
        *,
        held: bool = False,
        retry_after_s: float | None = None,
        generation: int = 0,
    ) -> None:
        news = Rejected(request, self._generation(generation), reason, "", retry_after_s, held)
        self.flow.message_came(Epoch(f"epoch-{name}"), news)

    def kill(self, name: str) -> None:
        epoch = Epoch(f"epoch-{name}")
        del self.fleet.workers[epoch]
        self.flow.worker_down(epoch)

    def blink(self, name: str) -> None:
        """Its stream breaks and is there again."""
        self.flow.worker_back(Epoch(f"epoch-{name}"))

    def join(self, name: str, role: Role, **changes: object) -> None:
        worker = candidate(name, role, **changes)
        self.fleet.workers[worker.epoch] = worker
        self.flow.worker_up(worker.epoch)

    def _generation(self, given: int) -> Generation:
        return Generation(given) if given else self.last_attach()[1].generation


def token(
    request: RequestId, position: int, *, choice: int = 0, last: bool = False, value: int | None = None
) -> TokenOut:
    """Token ``1000 * choice + position``, unless ``value`` says otherwise."""
    finish = FinishReason.LENGTH if last else None
    return TokenOut(request, choice, position, 1000 * choice + position if value is None else value, finish=finish)


async def read_all(stream: RequestStream) -> list[TokenOut]:
    return [out async for batch in stream for out in batch]
