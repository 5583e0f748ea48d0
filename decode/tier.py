"""The decode tier's decisions: for whom room is reserved, what runs, and what is let go.

    router ──Attach──▶ ┐                                      Offer ──reserve──▶ Grant ──▶ ... ──▶ Adopted
                       ├─▶ runs ─▶ Tokens, step by step          (the receive session's part)        │
    KV is here ──────▶ ┘ ◀──────────────────────────────────────────────────────────────────────────┘
                         or computed here: Attach(local), or the KV that came was damaged

Runs on the event loop. Implements what a receive session asks of its owner (``Intake``). Knows nothing of HTTP, of
text, or of how a hand-off's messages travel.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from decode.seats import Seat
from engine.core import EngineCore
from engine.kv_memory import KvMemory
from engine.rules import FinishRules
from engine.sequence import Reservation
from kvtransfer.fences import FenceTable, Refused
from kvtransfer.intake import Refusal
from kvtransfer.receive_session import ReceiveSession
from kvtransfer.receiver import CORRUPT
from kvtransfer.transport import Link
from kvtransfer.transports import PayloadReader
from proto.control import Abort, Attach, FromRouter, RejectReason, Renew
from proto.errors import DeviceLost, InvalidRequest, RemoteProtocolError
from proto.handoff import Fence, Offer, RefuseReason, Seal, SealedChoice
from proto.ids import Generation, RequestId, try_id
from proto.lifecycle import Stage
from proto.request import Request, TokenOut
from service.metrics import WorkerMetrics
from worker.host import EngineHost, StepNews
from worker.leases import Leases, Orphaned
from worker.news import News
from worker.routers import RouterStreams
from worker.tasks import Tasks

log = logging.getLogger(__name__)


class DecodeTier:
    """Serves routers' requests on one engine, from KV that arrives or that it computes. ``close`` lets go of all."""

    def __init__(
        self,
        host: EngineHost,
        routers: RouterStreams,
        fences: FenceTable,
        readers: Sequence[PayloadReader],
        *,
        metrics: WorkerMetrics,
        orphaned: Orphaned | None = None,
    ) -> None:
        self._host = host
        self._routers = routers
        self._fences = fences
        self._readers = readers
        self._metrics = metrics
        self._news = News(routers, metrics)
        self._seats: dict[RequestId, Seat] = {}
        self._by_key: dict[RequestId, Seat] = {}
        self._leases = Leases(self._lease_ended, routers.has_router_of)
        routers.subscribe(self._leases.router_left)
        self._orphaned = orphaned
        self._tasks = Tasks()
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_draining = False

    async def open(self) -> None:
        """There is nothing to prepare: what blocks may come by was made with the tier."""

    async def drained(self) -> None:
        """Returns once every request here is finished."""
        await self._idle.wait()

    async def close(self) -> None:
        """What is unfinished goes back to its router, to go on elsewhere."""
        for seat in list(self._seats.values()):
            self._give_up(seat, "the decode worker stops", RejectReason.DRAINING)
        self._leases.close()
        await self._tasks.aclose()
        for reader in self._readers:
            reader.close()

    # What routers say.

    def handle(self, message: FromRouter) -> None:
        match message:
            case Attach():
                self._attach(message)
            case Abort():
                self._abort(message)
            case Renew():
                for request in message.requests:
                    self._leases.renew(request, message.lease_s)
            case _:
                self._fences.refusals.add(Refused.MALFORMED)
                log.warning("a decode worker was sent %s; it is ignored", type(message).__name__)

    def _attach(self, message: Attach) -> None:
        request, generation = message.request.id, message.generation
        seat = self._seats.get(request)
        if seat is not None and seat.generation == generation and seat.attach is not None:
            self._replay(seat, message)
            return
        if seat is None and self._fences.is_over(request, generation):
            self._refuse_stale(message, "this try is over here")
            return
        if generation < self._fences.highest(request) or (seat is not None and generation < seat.generation):
            self._refuse_stale(message, "a newer try of this request is known")
            return
        if self.is_draining and seat is None:
            self._news.reject(request, generation, RejectReason.DRAINING, "the decode worker is draining")
            return
        if seat is None or seat.generation < generation:
            seat = self._take(request, generation)
        seat.attach = message
        self._leases.grant(request, message.lease_s)
        if message.local:
            self._fences.end(request, generation, self._now())
        if message.local or seat.must_compute:
            self._compute(seat, message.request)
        elif seat.arrived is not None:
            self._run(seat, message.request, seat.arrived)

    def _refuse_stale(self, message: Attach, why: str) -> None:
        self._fences.refusals.add(Refused.STALE_GENERATION)
        self._news.reject(message.request.id, message.generation, RejectReason.STALE, why)

    def _replay(self, seat: Seat, message: Attach) -> None:
        """The router has come back, and says what it has."""
        seat.attach = message
        self._leases.grant(seat.request, message.lease_s)
        self._routers.send_tokens((seat.generation, token) for token in seat.since(message.positions))

    def _abort(self, message: Abort) -> None:
        seat = self._seats.get(message.request)
        if message.choices:
            if seat is not None and seat.generation == message.generation:
                self._stop_choices(seat, message.choices)
            return
        self._fences.end(message.request, message.generation, self._now())
        if seat is not None and seat.generation <= message.generation:
            self._drop(seat, "aborted")

    def _stop_choices(self, seat: Seat, choices: tuple[int, ...]) -> None:
        for choice in choices:
            seat.stop(choice)
            self._host.tell(partial(_finish_choice, key=seat.key, choice=choice))
        if seat.is_done:
            self._finished(seat)

    def _take(self, request: RequestId, generation: Generation) -> Seat:
        if (older := self._seats.get(request)) is not None:
            self._drop(older, f"superseded by generation {generation}")
        seat = Seat(request, generation)
        self._seats[request] = self._by_key[seat.key] = seat
        self._idle.clear()
        return seat

    # How a seat comes to run.

    def _compute(self, seat: Seat, request: Request) -> None:
        """Computes the prompt here: few tokens of it are uncached, it is resumed, or what came was damaged."""
        seat.begin(request)
        self._progress(seat, Stage.QUEUED)
        engine_request = replace(request, id=seat.key)
        self._tasks.spawn(self._admit(seat, self._host.post(lambda core: core.add(engine_request))))
        self._stop_choices(seat, tuple(seat.stopped))

    def _run(self, seat: Seat, request: Request, choices: tuple[SealedChoice, ...]) -> None:
        """The KV is here and the request is known. The first tokens are P's; they are repeated to the router, which
        counts, for the case that P died before it could say them itself."""
        if tuple(self._host.parts.hasher.all_blocks(request.prefix, request.cache_salt)) != seat.hashes:
            log.error("request %s: the KV that came is of other tokens; it is dropped", request.id)
            self._host.tell(lambda core: core.cancel(seat.key))
            self._compute(seat, request)
            return
        seat.begin(request)
        first = [choice.first_token for choice in choices]
        engine_request = replace(request, id=seat.key)
        self._tasks.spawn(self._admit(seat, self._host.post(lambda core: core.adopt(engine_request, first))))
        self._progress(seat, Stage.DECODING)
        self._take_first_tokens(
            seat, self._first_tokens(request, first), has_logprobs=request.params.logprobs is not None
        )
        self._stop_choices(seat, tuple(seat.stopped))

    def _take_first_tokens(self, seat: Seat, tokens: list[TokenOut], *, has_logprobs: bool) -> None:
        if not has_logprobs:
            self._routers.send_tokens([(seat.generation, self._record(seat, token)) for token in tokens])
            return
        # Log probabilities are not part of a hand-off: where they are wanted, only P can say a first token. One that
        # ends its choice ends it here all the same.
        for token in tokens:
            if token.finish is not None:
                seat.stop(token.choice)

    def _first_tokens(self, request: Request, first: list[int]) -> list[TokenOut]:
        rules = FinishRules.of(request, self._host.parts.facts)
        tokens = []
        for choice, (position, token) in enumerate(zip(request.num_forced, first, strict=False)):
            ending = rules.ending(position, token)
            finish, stop_token = (ending.reason, ending.stop_token) if ending else (None, None)
            tokens.append(TokenOut(request.id, choice, position, token, finish=finish, stop_token=stop_token))
        return tokens

    async def _admit(self, seat: Seat, answer: asyncio.Future[None]) -> None:
        if error := await self._news.was_admitted(seat.request, seat.generation, answer):
            self._drop(seat, error.message)

    # What a receive session asks and says.

    async def serve(self, link: Link) -> None:
        """Takes one hand-off in, from a prefill worker that opened ``link``."""
        try:
            await ReceiveSession(link, self._host.parts.kv, self, self._fences, readers=self._readers).run()
        except DeviceLost as lost:
            self._host.condemn(lost)

    async def reserve(self, offer: Offer) -> Reservation | Refusal:
        """Room for an offered prompt, under the engine's name for this try."""
        answer = await self._reserve(offer)
        if isinstance(answer, Refusal):
            self._metrics.handoff_refused(answer.reason)
        return answer

    async def _reserve(self, offer: Offer) -> Reservation | Refusal:
        fence = offer.fence
        if self.is_draining:
            return Refusal(RefuseReason.DRAINING, "the decode worker is draining")
        seat = self._seats.get(fence.request)
        if seat is not None and seat.generation > fence.generation:
            return Refusal(RefuseReason.STALE, f"generation {seat.generation} is known")
        key = try_id(fence.request, fence.generation)
        try:
            reservation = await self._host.call(partial(_reserve, kv=self._host.parts.kv, key=key, offer=offer))
        except InvalidRequest as never:
            return Refusal(RefuseReason.MISMATCH, never.message)
        except RemoteProtocolError as broken:
            return Refusal(RefuseReason.MISMATCH, broken.message)
        if reservation is None:
            return Refusal(RefuseReason.FULL, "no free KV blocks", retry_after_s=1.0)
        seat = self._seats.get(fence.request)
        if self._fences.highest(fence.request) > fence.generation or (
            seat is not None and seat.generation > fence.generation
        ):
            self._host.tell(lambda core: core.cancel(key))
            return Refusal(RefuseReason.STALE, "a newer try came meanwhile")
        if seat is None or seat.generation < fence.generation:
            seat = self._take(fence.request, fence.generation)
            self._leases.grant(fence.request, offer.lease_s)
        seat.hashes, seat.is_receiving = offer.hashes, True
        return reservation

    async def sealed(self, fence: Fence, seal: Seal) -> None:
        if seat := self._seat_of(fence):
            self._progress(seat, Stage.SEALED)

    async def adopted(self, fence: Fence, seal: Seal, num_bytes: int, duration_s: float) -> None:
        """Every block is verified and in place. What is not wanted any more is freed by ``_drop`` or by ``freed``."""
        if (seat := self._seat_of(fence)) is None:
            key = try_id(fence.request, fence.generation)
            self._host.tell(lambda core: core.abort(key, seal.num_blocks))
            return
        seat.arrived, seat.is_receiving = seal.choices, False
        self._progress(seat, Stage.ADOPTED, num_bytes=num_bytes, duration_s=duration_s)
        if seat.attach is not None:
            self._run(seat, seat.attach.request, seat.arrived)

    async def freed(self, fence: Fence, num_verified: int, reason: str) -> None:
        """The hand-off is over without adoption, or was taken back after it; nothing is being copied any more."""
        key = try_id(fence.request, fence.generation)
        if (seat := self._seat_of(fence)) is not None:
            if seat.is_running:
                return
            seat.is_receiving, seat.arrived = False, None
        await self._host.call(lambda core: core.cancel(key, num_verified))
        seat = self._seat_of(fence)
        if seat is None or seat.is_running:
            return
        if reason == CORRUPT:
            log.warning("request %s: its KV came damaged; computing it here", fence.request)
            seat.must_compute = True
            if seat.attach is not None:
                self._compute(seat, seat.attach.request)
            return
        if seat.attach is not None:
            self._news.reject(fence.request, fence.generation, RejectReason.PEER_LOST, reason)
        if not self._routers.has_router_of(fence.request):
            self._orphan(seat)
        self._drop(seat, reason)

    # What the engine says.

    def started(self, request: RequestId) -> None:
        if seat := self._by_key.get(request):
            self._progress(seat, Stage.PREFILLING)

    def stepped(self, news: StepNews) -> None:
        output = news.output
        for key, num_cached in zip(output.started, output.num_cached, strict=True):
            if seat := self._by_key.get(key):
                seat.num_cached = num_cached
        outgoing: list[tuple[Generation, TokenOut]] = []
        for token in output.tokens:
            if (seat := self._by_key.get(token.request)) is None:
                continue
            if seat.clock.stage is Stage.PREFILLING:
                self._progress(seat, Stage.DECODING, num_cached=seat.num_cached)
            outgoing.append((seat.generation, self._record(seat, replace(token, request=seat.request))))
        self._routers.send_tokens(outgoing)
        for key in output.failed:
            if seat := self._by_key.get(key):
                self._news.fail_not_finite(seat.request, seat.generation)
                self._drop(seat, "its logits are not finite")

    def _record(self, seat: Seat, token: TokenOut) -> TokenOut:
        seat.record(token)
        if seat.is_done:
            self._finished(seat)
        return token

    def _finished(self, seat: Seat) -> None:
        """Its tokens stay for one more lease, for a router that comes back."""
        assert seat.attach is not None, "nothing runs without"
        self._leases.grant(seat.request, seat.attach.lease_s)
        self._note_idle()

    def _note_idle(self) -> None:
        if all(seat.is_done for seat in self._seats.values()):
            self._idle.set()

    def crashed(self, error: BaseException) -> None:
        for seat in list(self._seats.values()):
            self._give_up(seat, f"the engine failed: {error}")

    # The end of a seat.

    def _lease_ended(self, request: RequestId) -> None:
        if seat := self._seats.get(request):
            if not seat.is_done:
                log.warning("request %s: no news from its router, its lease has ended", request)
                self._metrics.lease_expired()
            if not seat.is_done or not self._routers.has_router_of(request):
                self._orphan(seat)
            self._give_up(seat, "the lease has ended")

    def _orphan(self, seat: Seat) -> None:
        if self._orphaned is not None:
            self._orphaned(seat.request, seat.generation)

    def _give_up(self, seat: Seat, reason: str, as_told: RejectReason = RejectReason.UNKNOWN) -> None:
        """By our own decision: the router, if it is there and waits for it, need not find out by waiting."""
        if seat.attach is not None and not seat.is_done:
            self._news.reject(seat.request, seat.generation, as_told, reason)
        self._drop(seat, reason)

    def _drop(self, seat: Seat, reason: str) -> None:
        """Frees all that the seat holds, and ends its hand-off. May be called twice."""
        if self._by_key.pop(seat.key, None) is None:
            return
        log.debug("request %s, try %d: %s", seat.request, seat.generation, reason)
        if self._seats.get(seat.request) is seat:
            del self._seats[seat.request]
            self._leases.end(seat.request)
        self._fences.end(seat.request, seat.generation, self._now())
        if not seat.is_receiving:
            num_verified = 0 if seat.arrived is None else len(seat.hashes)
            self._host.tell(lambda core: core.abort(seat.key, num_verified))
        self._note_idle()

    # Helpers.

    def _seat_of(self, fence: Fence) -> Seat | None:
        seat = self._seats.get(fence.request)
        return seat if seat is not None and seat.generation == fence.generation else None

    def _progress(
        self, seat: Seat, stage: Stage, *, num_cached: int = 0, num_bytes: int = 0, duration_s: float | None = None
    ) -> None:
        self._news.progress(
            seat.request,
            seat.generation,
            seat.clock,
            stage,
            num_cached=num_cached,
            num_bytes=num_bytes,
            duration_s=duration_s,
        )

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _reserve(core: EngineCore, *, kv: KvMemory, key: RequestId, offer: Offer) -> Reservation | None:
    """What arrives is written behind whatever was queued for these blocks before."""
    reservation = core.reserve(key, offer.hashes, offer.num_tokens, offer.num_choices)
    kv.fence()
    return reservation


def _finish_choice(core: EngineCore, *, key: RequestId, choice: int) -> None:
    core.finish_choice(key, choice)
