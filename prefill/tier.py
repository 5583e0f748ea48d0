"""The prefill tier's decisions: whose prompt is computed, when its blocks are offered, and when they are let go.

    Prefill ──▶ QUEUED ──engine starts──▶ PREFILLING, Offer ──Grant──▶ STREAMING ──▶ SEALED ──Adopted──▶ released
                                                        └─ Refuse, Stale, or D lost: held under the lease; the router
                                                           is told, and answers with Redirect or Abort

Runs on the event loop. Knows nothing of HTTP, of text, or of how a hand-off's messages travel.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from engine.output import Filled
from kvtransfer.fences import FenceTable, Refused
from kvtransfer.intake import PEER_LOST
from kvtransfer.send_session import SendSession
from prefill.handoff import Dispatcher
from prefill.job import Job
from proto.control import Abort, FromRouter, Prefill, Redirect, RejectReason, Renew
from proto.errors import DeviceLost, StaleMessage
from proto.handoff import Fence, RefuseReason, SealedChoice
from proto.ids import Epoch, Generation, RequestId
from proto.lifecycle import Stage
from proto.request import TokenOut
from service.metrics import WorkerMetrics
from worker.host import EngineHost, StepNews
from worker.leases import Leases, Orphaned
from worker.news import News
from worker.routers import RouterStreams
from worker.tasks import Tasks

log = logging.getLogger(__name__)

_BACKSTOP_S = 1.0
"""How much later a session's own lease ends than its job's, whose end is told to others."""
_WHY_HELD: dict[RefuseReason | str, RejectReason] = {
    PEER_LOST: RejectReason.PEER_LOST,
    RefuseReason.MISMATCH: RejectReason.MISMATCH,
    RefuseReason.STALE: RejectReason.STALE,
}


class PrefillTier:
    """Serves routers' prompts on one engine. ``close`` lets go of everything."""

    def __init__(
        self,
        host: EngineHost,
        routers: RouterStreams,
        dispatcher: Dispatcher,
        fences: FenceTable,
        *,
        epoch: Epoch,
        metrics: WorkerMetrics,
        max_held: int,
        orphaned: Orphaned | None = None,
    ) -> None:
        self._host = host
        self._routers = routers
        self._dispatcher = dispatcher
        self._fences = fences
        self._epoch = epoch
        self._metrics = metrics
        self._news = News(routers, metrics)
        self._max_held = max_held
        self._jobs: dict[RequestId, Job] = {}
        self._by_key: dict[RequestId, Job] = {}
        self._leases = Leases(self._lease_ended, routers.has_router_of)
        routers.subscribe(self._leases.router_left)
        self._orphaned = orphaned
        self._tasks = Tasks()
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_draining = False

    async def open(self) -> None:
        """Raises SettingsError where blocks can leave by none of the ways that are allowed."""
        await self._dispatcher.open()

    async def drained(self) -> None:
        """Returns once no prompt is waiting, computed here, or on its way."""
        await self._idle.wait()

    async def close(self) -> None:
        """What is unfinished goes back to its router, to go on elsewhere."""
        for job in list(self._jobs.values()):
            self._give_up(job, "the prefill worker stops", RejectReason.DRAINING)
        self._leases.close()
        await self._tasks.aclose()

    # What routers say.

    def handle(self, message: FromRouter) -> None:
        match message:
            case Prefill():
                self._prefill(message)
            case Redirect():
                self._redirect(message)
            case Abort():
                self._abort(message)
            case Renew():
                for request in message.requests:
                    self._leases.renew(request, message.lease_s)
                    if (job := self._jobs.get(request)) and job.session is not None:
                        job.session.renew(message.lease_s + _BACKSTOP_S)
            case _:
                self._fences.refusals.add(Refused.MALFORMED)
                log.warning("a prefill worker was sent %s; it is ignored", type(message).__name__)

    def _prefill(self, message: Prefill) -> None:
        request, generation = message.request, message.generation
        if self.is_draining:
            self._news.reject(request.id, generation, RejectReason.DRAINING, "the prefill worker is draining")
            return
        job = Job.of(message)
        try:
            self._open_fence(job)
        except StaleMessage as stale:
            self._news.reject(request.id, generation, RejectReason.STALE, stale.message)
            return
        self._jobs[request.id] = self._by_key[job.key] = job
        self._idle.clear()
        self._leases.grant(request.id, message.lease_s)
        self._progress(job, Stage.QUEUED)
        engine_request = replace(request, id=job.key)
        admitted = self._host.post(lambda core: core.add(engine_request, hold=True))
        self._tasks.spawn(self._admit(job, admitted))

    async def _admit(self, job: Job, answer: asyncio.Future[None]) -> None:
        await asyncio.wait([answer])  # a Redirect may come meanwhile
        if error := await self._news.was_admitted(job.request.id, job.generation, answer):
            self._drop(job, error.message)

    def _redirect(self, message: Redirect) -> None:
        job = self._jobs.get(message.request)
        if job is None:
            self._fences.refusals.add(Refused.UNKNOWN)
            text = "the prompt's blocks are not held here any more"
            self._news.reject(message.request, message.generation, RejectReason.UNKNOWN, text)
            return
        if message.generation <= job.generation:
            self._fences.refusals.add(Refused.STALE_GENERATION)
            self._news.reject(message.request, message.generation, RejectReason.STALE, f"already at {job.generation}")
            return
        job.generation, job.decode, job.is_held = message.generation, message.decode, False
        try:
            self._open_fence(job)
        except StaleMessage as stale:
            self._news.reject(message.request, message.generation, RejectReason.STALE, stale.message)
            self._drop(job, stale.message)
            return
        self._count_held()
        if job.session is not None and not job.session.redirect(message.generation, message.decode):
            # The one before has just adopted them, which the router did not know.
            self._give_up(job, "the prompt's blocks have just been let go of")

    def _abort(self, message: Abort) -> None:
        if message.choices:
            return  # Single choices are let go of where they run; all of them share this prompt.
        self._fences.end(message.request, message.generation, self._now())
        job = self._jobs.get(message.request)
        if job is not None and job.generation <= message.generation:
            self._drop(job, "aborted")

    def _open_fence(self, job: Job) -> None:
        """One live try per request: an older one is dropped, an equal or older message is refused."""
        fence = Fence(job.request.id, job.generation, self._epoch, self._epoch)
        self._fences.open(fence, self._now(), lambda newer: self._superseded(job, newer))

    def _superseded(self, job: Job, newer: Generation) -> None:
        if job.generation < newer:
            self._drop(job, f"superseded by generation {newer}")

    # What the engine says.

    def started(self, request: RequestId) -> None:
        if (job := self._by_key.get(request)) is None:
            return
        self._progress(job, Stage.PREFILLING)
        job.session = self._dispatcher.session(job, _JobEvents(self, job))
        self._tasks.spawn(self._hand_over(job, job.session))

    async def _hand_over(self, job: Job, session: SendSession) -> None:
        try:
            await session.run()
        except DeviceLost as lost:
            self._host.condemn(lost)
        except Exception:
            text = "the hand-off failed by an error of the prefill worker"
            self._news.reject(job.request.id, job.generation, RejectReason.UNKNOWN, text)
            raise

    def stepped(self, news: StepNews) -> None:
        output = news.output
        for key, num_cached in zip(output.started, output.num_cached, strict=True):
            if job := self._by_key.get(key):
                job.num_cached = num_cached
        first_tokens: dict[RequestId, list[TokenOut]] = {}
        for token in output.tokens:
            first_tokens.setdefault(token.request, []).append(token)
        for key in first_tokens:
            if job := self._by_key.get(key):
                # Before the tokens: with those of a request that ends here, its router forgets it.
                self._progress(job, Stage.SEALED, num_cached=job.num_cached)
        self._send_tokens(first_tokens)
        for filled in output.filled:
            if job := self._by_key.get(filled.request):
                self._pass_on(job, filled, first_tokens.get(filled.request, []))
        for key, tokens in first_tokens.items():
            if (job := self._by_key.get(key)) and all(token.finish is not None for token in tokens):
                self._drop(job, "finished at the first token")
        for key in output.failed:
            if job := self._by_key.get(key):
                self._news.fail_not_finite(job.request.id, job.generation)
                self._drop(job, "its logits are not finite")

    def _send_tokens(self, first_tokens: dict[RequestId, list[TokenOut]]) -> None:
        """At once, whatever the decode worker does: the time to the first token is the prefill's."""
        self._routers.send_tokens(
            (job.generation, replace(token, request=job.request.id))
            for key, tokens in first_tokens.items()
            if (job := self._by_key.get(key))
            for token in tokens
        )

    def _pass_on(self, job: Job, filled: Filled, first_tokens: Sequence[TokenOut]) -> None:
        assert job.session is not None, "blocks are filled after the request has started"
        if filled.blocks:
            job.session.blocks_ready(filled.first_index, filled.blocks)
        if filled.sealed:
            job.is_computed = True
            choices = tuple(SealedChoice(token.token) for token in sorted(first_tokens, key=lambda each: each.choice))
            job.session.seal(filled.first_index + len(filled.blocks), filled.num_tokens_last, choices)
            self._cap_held()

    def crashed(self, error: BaseException) -> None:
        for job in list(self._jobs.values()):
            self._give_up(job, f"the engine failed: {error}")

    # What hand-offs say.

    def granted(self, job: Job, transport: str) -> None:
        job.transport = transport
        if job.clock.stage is Stage.PREFILLING:
            self._progress(job, Stage.STREAMING)

    def held(self, job: Job, why: RefuseReason | Literal["peer_lost"], message: str) -> None:
        if isinstance(why, RefuseReason) and why is not RefuseReason.STALE:
            self._metrics.handoff_refused(why)
        if job.key not in self._by_key:
            return
        job.is_held = True
        retry_after_s = job.session.retry_after_s if job.session else None
        reason = _WHY_HELD.get(why, RejectReason.REFUSED)
        self._news.reject(job.request.id, job.generation, reason, message, retry_after_s, held=True)
        self._cap_held()

    def _cap_held(self) -> None:
        """A worker full of waiting blocks and a full decode worker must not wait for each other: the newest goes."""
        held = self._count_held()
        if len(held) > self._max_held:
            newest = held[-1]
            text = f"more than {self._max_held} computed prompts wait for a decode worker"
            self._news.reject(newest.request.id, newest.generation, RejectReason.FULL, text)
            self._drop(newest, text)

    def _count_held(self) -> list[Job]:
        held = [job for job in self._jobs.values() if job.is_held and job.is_computed]
        self._metrics.set_held(len(held))
        return held

    def adopted(self, job: Job, num_bytes: int, duration_s: float) -> None:
        """The router hears of it from here as well: it is to know that nothing can be redirected any more, also where
        the decode worker cannot tell it."""
        self._metrics.transferred(job.transport, num_bytes, duration_s)
        if job.key in self._by_key:
            self._progress(job, Stage.ADOPTED)

    def released(self, job: Job) -> None:
        """Nothing reads the blocks any more."""
        self._drop(job, "the hand-off has ended")
        self._host.tell(lambda core: core.abort(job.key))

    # The end of a job.

    def _lease_ended(self, request: RequestId) -> None:
        if job := self._jobs.get(request):
            log.warning("request %s: no news from its router, its lease has ended", request)
            self._metrics.lease_expired()
            if self._orphaned is not None:
                self._orphaned(request, job.generation)
            self._give_up(job, "the lease has ended")

    def _give_up(self, job: Job, reason: str, as_told: RejectReason = RejectReason.UNKNOWN) -> None:
        """By our own decision: the router, if it is there, need not find out by waiting."""
        self._news.reject(job.request.id, job.generation, as_told, reason)
        self._drop(job, reason)

    def _drop(self, job: Job, reason: str) -> None:
        """Forgets the job. Its blocks are freed now, or when its session has let go of them. May be called twice."""
        if self._by_key.pop(job.key, None) is None:
            return
        if self._jobs.get(job.request.id) is job:
            del self._jobs[job.request.id]
            self._leases.end(job.request.id)
        fence = Fence(job.request.id, job.generation, self._epoch, self._epoch)
        self._fences.close(fence, self._now())
        if job.session is not None:
            job.session.withdraw(reason)
        else:
            self._host.tell(lambda core: core.abort(job.key))
        if job.is_held:
            self._count_held()
        if not self._jobs:
            self._idle.set()

    # Helpers.

    def _progress(self, job: Job, stage: Stage, *, num_cached: int = 0) -> None:
        self._news.progress(job.request.id, job.generation, job.clock, stage, num_cached=num_cached)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


class _JobEvents:
    """What one job's session tells the tier (``SendEvents``)."""

    def __init__(self, tier: PrefillTier, job: Job) -> None:
        self._tier = tier
        self._job = job

    def granted(self, num_present: int, transport: str) -> None:
        self._tier.granted(self._job, transport)

    def held(self, reason: RefuseReason | Literal["peer_lost"], message: str) -> None:
        self._tier.held(self._job, reason, message)

    def adopted(self, num_bytes: int, duration_s: float) -> None:
        self._tier.adopted(self._job, num_bytes, duration_s)

    def released(self) -> None:
        self._tier.released(self._job)
