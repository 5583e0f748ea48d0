"""A worker process: its gRPC port, its probes, its engine, its tier, and its place on the ledger.

    start   the ports open at once and say "loading"; weights, KV memory, warm-up; then the ledger learns of us
    run     until the engine fails
    stop    take nothing new, say so, finish what there is, leave the ledger, close

Knows what both tiers have in common. What a tier decides is behind ``Tier``; models are behind ``EngineHost``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc

from kvtransfer.fences import Refusals, Refused
from kvtransfer.ledger import records
from kvtransfer.ledger.publisher import WorkerPublisher
from kvtransfer.ledger.redis import RedisLedger
from proto.control import FromRouter, Load, LoadReport, ModelCard, Role, Welcome
from proto.errors import NoWorker, RemoteProtocolError, SettingsError
from proto.health import HealthReport
from proto.ids import BlockHash, Epoch, Generation, RequestId, WorkerId, new_epoch
from proto.inventory import CacheChange
from proto.layout import WIRE_VERSION
from proto.lifecycle import Stage
from proto.settings import EngineSettings, LedgerSettings, RpcSettings, WorkerSettings
from service.address import is_host, join_address, own_address, split_address
from service.health import Health
from service.http import HttpServer, worker_app
from service.metrics import EngineTotals, WorkerMetrics, show_ledger, show_publisher
from service.rpc import RouterStream, TlsFiles, serve, worker_handler
from worker.host import EngineHost, StepNews
from worker.leases import Orphaned
from worker.routers import RouterStreams

log = logging.getLogger(__name__)

LOAD_REPORT_EVERY_S = 0.1
TOMBSTONE_S = 3600.0
"""How long an ended request is remembered, so that a late message revives nothing: longer than any request lives."""
_UNKNOWN_LOAD = Load()
_NAME = re.compile(r"[!-+\--~]{1,128}")
"""Printable ASCII without spaces and commas: answers name their workers in a header, as a list."""


class Tier(Protocol):
    """What a tier decides. Everything is called on the event loop."""

    is_draining: bool

    async def open(self) -> None:
        """The engine is there; no request is yet. Raises SettingsError where the tier cannot do its work here."""

    def handle(self, message: FromRouter) -> None: ...

    def started(self, request: RequestId) -> None: ...

    def stepped(self, news: StepNews) -> None: ...

    def crashed(self, error: BaseException) -> None: ...

    async def drained(self) -> None:
        """Returns when nothing is unfinished."""

    async def close(self) -> None:
        """Lets go of everything; routers are told of what was unfinished."""


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What a tier is built from."""

    epoch: Epoch
    host: EngineHost
    routers: RouterStreams
    metrics: WorkerMetrics
    refusals: Refusals
    settings: WorkerSettings
    orphaned: Orphaned
    rpc: RpcSettings
    tls: TlsFiles | None
    address: Callable[[], str]
    """host:port others reach this worker by; known once it listens."""


TierParts = tuple[Tier, Sequence[grpc.GenericRpcHandler]]
"""A tier, and the gRPC services it offers besides the routers'."""


class WorkerService:
    """One worker. ``build_tier`` is called once, before the engine is loaded. Raises SettingsError where there is no
    Redis to meet at, or its URL is malformed, and for a name that answers cannot show."""

    def __init__(
        self,
        role: Role,
        engine: EngineSettings,
        worker: WorkerSettings,
        ledger: LedgerSettings,
        build_tier: Callable[[WorkerContext], TierParts],
        rpc: RpcSettings,
    ) -> None:
        if ledger.redis is None:
            raise SettingsError(
                f"tandem {role.value} meets the other tiers at a Redis: give --redis URL (or TANDEM_REDIS)"
            )
        self._role = role
        self._engine_settings = engine
        self._settings = worker
        self._ledger_settings = ledger
        self._ledger = RedisLedger.from_settings(ledger)
        self._tls = TlsFiles.of(rpc, is_server=True)
        self._address = ""
        self.epoch = new_epoch()
        self._worker = named(worker, role, self.epoch)
        self._health = Health(stall_after_s=worker.stall_timeout)
        self._host = EngineHost(engine, self)
        self._health.watch(lambda: self._host.heartbeat)
        self._routers = RouterStreams()
        model = engine.model
        self._refusals = Refusals()
        name = next(iter(model.served_model_name), None) or model.model or ""
        self._metrics = WorkerMetrics(name, role, self._refusals)
        context = WorkerContext(
            epoch=self.epoch,
            host=self._host,
            routers=self._routers,
            metrics=self._metrics,
            refusals=self._refusals,
            settings=worker,
            orphaned=self._orphaned,
            rpc=rpc,
            tls=self._tls,
            address=lambda: self._address,
        )
        self._tier, self._handlers = build_tier(context)
        self._load = _UNKNOWN_LOAD
        self._last_report = 0.0
        self._crashed: asyncio.Future[None] | None = None
        self._server: grpc.aio.Server | None = None
        self._http: HttpServer | None = None
        self._publisher: WorkerPublisher | None = None

    # Startup, run, shutdown.

    async def start(self) -> None:
        self._crashed = asyncio.get_running_loop().create_future()
        handler = worker_handler(
            self._describe,
            self._report,
            self._on_stream,
            on_malformed=lambda: self._refusals.add(Refused.MALFORMED),
        )
        handlers = [handler, *self._handlers]
        self._server, port = await serve(self._settings.host, self._settings.port, handlers, self._tls)
        self._address = await asyncio.to_thread(advertised, self._settings, port, self._ledger.host)
        await self._start_http()
        with contextlib.suppress(records.LedgerAway):  # who publishes there waits for it
            await self._ledger.connect()
        await self._host.open(self._health.loading)
        await self._tier.open()
        self._show_memory()
        record = self._record()
        self._publisher = publisher = WorkerPublisher(
            self._ledger,
            record,
            load=lambda: self._load,
            snapshot=self._snapshot,
            heartbeat_s=self._ledger_settings.heartbeat_s,
        )
        show_ledger(self._metrics, lambda: self._ledger.counts, lambda: publisher.counts.num_dropped_handoffs)
        show_publisher(self._metrics, lambda: publisher.counts)
        publisher.start()
        self._health.ready()
        log.info("%s worker %s is ready at %s", self._role.value, record.worker, record.address)

    async def run(self) -> None:
        assert self._crashed is not None
        await self._crashed

    async def stop(self) -> None:
        self._tier.is_draining = True
        self._health.draining()
        if self._publisher is not None:
            self._publisher.drain()
            await self._drain()
        await self._tier.close()
        if self._publisher is not None:
            await self._publisher.close()
        await self._ledger.close()
        if self._server is not None:
            await self._server.stop(grace=1.0)
        if self._http is not None:
            await self._http.stop()
        await self._host.close()

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(self._settings.drain_timeout):
                await self._tier.drained()
        except TimeoutError:
            log.warning("not done after %g s of draining: the rest is handed over", self._settings.drain_timeout)

    async def _start_http(self) -> None:
        if self._settings.http_port is None:
            return
        app = worker_app(self._health.report, self._metrics.exposition)
        self._http = HttpServer(app, self._settings.host, self._settings.http_port)
        await self._http.start()
        log.info("metrics are at http://%s/metrics", self._http_address())

    def _http_address(self) -> str | None:
        """host:port by which others reach its probes and metrics."""
        host, _ = split_address(self._address)
        return join_address(host, self._http.port) if self._http else None

    def _show_memory(self) -> None:
        facts = self._host.parts.facts
        self._load = Load(num_free_blocks=facts.num_blocks, num_blocks=facts.num_blocks)
        self._metrics.set_load(self._load)
        self._metrics.set_cache_config(
            block_size=facts.block_size,
            num_blocks=facts.num_blocks,
            max_concurrency=facts.max_concurrency,
            prefix_caching=self._engine_settings.cache.enable_prefix_caching,
        )

    def _record(self) -> records.WorkerRecord:
        parts = self._host.parts
        return records.WorkerRecord(
            worker=self._worker,
            role=self._role,
            epoch=self.epoch,
            address=self._address,
            http_address=self._http_address(),
            layout=parts.facts.layout.fingerprint(),
            numerics=parts.facts.numerics,
            model=parts.card.served_names[0],
            model_digest=parts.card.digest,
            block_size=parts.facts.block_size,
            num_blocks=parts.facts.num_blocks,
            load=self._load,
            started_at=time.time(),
            scheduling_policy=self._engine_settings.scheduler.scheduling_policy,
        )

    # What routers ask.

    async def _describe(self) -> ModelCard:
        self._demand_ready()
        return self._host.parts.card

    async def _report(self) -> HealthReport:
        return self._health.report()

    async def _on_stream(self, stream: RouterStream) -> None:
        self._demand_ready()
        meant = stream.hello.worker_epoch
        if meant and meant != self.epoch:
            self._refusals.add(Refused.FOREIGN_EPOCH)
            raise RemoteProtocolError(f"the router means incarnation {meant}; this is {self.epoch}")
        stream.send(Welcome(self._worker, self.epoch, self._role, WIRE_VERSION))
        stream.send(LoadReport(self._load))
        await self._routers.serve(stream, self._tier.handle)

    def _demand_ready(self) -> None:
        if self._publisher is None:
            raise NoWorker(f"this worker is not ready: {self._health.report().detail}")

    def _orphaned(self, request: RequestId, generation: Generation) -> None:
        if self._publisher is not None:
            self._publisher.advance(records.HandoffRecord(request=request, generation=generation, stage=Stage.ABORTED))

    # What the engine says.

    def started(self, request: RequestId) -> None:
        self._tier.started(request)

    def stepped(self, news: StepNews) -> None:
        self._tier.stepped(news)
        self._load = news.load
        self._metrics.set_load(news.load)
        self._metrics.stepped(news.output.num_tokens, news.output.duration_s)
        stats = news.stats
        self._metrics.set_totals(
            EngineTotals(
                num_preemptions=stats.num_preemptions,
                cache_query_tokens=stats.cache_query_tokens,
                cache_hit_tokens=stats.cache_hit_tokens,
                prompt_tokens=stats.prompt_tokens_computed,
                generated_tokens=stats.generated_tokens,
                num_failed=stats.num_failed,
            )
        )
        self._report_load()

    def load_changed(self, load: Load) -> None:
        self._load = load
        self._metrics.set_load(load)
        self._report_load()

    def cache_changed(self, changes: list[CacheChange]) -> None:
        if self._publisher is not None:
            self._publisher.publish(changes)

    def crashed(self, error: BaseException) -> None:
        self._health.failed(f"the engine failed: {error}")
        self._tier.is_draining = True  # what still comes goes elsewhere at once
        self._tier.crashed(error)
        if self._crashed is not None and not self._crashed.done():
            self._crashed.set_exception(error)

    def _report_load(self) -> None:
        """Routers hear of it when it changes, but not at every step."""
        now = time.monotonic()
        is_idle = self._load.num_running + self._load.num_waiting == 0
        if is_idle or now - self._last_report >= LOAD_REPORT_EVERY_S:
            self._last_report = now
            self._routers.broadcast(LoadReport(self._load))

    async def _snapshot(self) -> Sequence[BlockHash]:
        return await self._host.call(lambda core: core.cached_hashes())


def named(settings: WorkerSettings, role: Role, epoch: Epoch) -> WorkerId:
    """The name by which others know this worker: as told, or one that no other has. Raises SettingsError."""
    name = settings.worker_id or f"{role.value}-{socket.gethostname()}-{epoch[:6]}"
    if not _NAME.fullmatch(name):
        raise SettingsError(
            f"{name!r} cannot be a worker's name: it stands in headers of HTTP. Give --worker-id up to 128 printable "
            "ASCII characters, without spaces and commas."
        )
    return WorkerId(name)


def advertised(settings: WorkerSettings, port: int, redis_host: str | None) -> str:
    """host:port by which others reach this worker: as told, or the address it listens on, or this host's.

    Those others are where Redis is, or beyond. Raises SettingsError. May wait for a name server.
    """
    told = settings.advertise
    if told is None:
        is_any = settings.host in ("0.0.0.0", "::", "")
        return join_address(own_address(redis_host) if is_any else settings.host, port)
    if is_host(told):
        return join_address(told, port)
    try:
        split_address(told)
    except ValueError as error:
        raise SettingsError(f"--advertise: {error}, nor a host alone") from None
    return told
