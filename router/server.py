"""The router as a process: the ledger's watcher, the fleet, the flow and HTTP, put together and taken apart.

start   HTTP opens at once: probes answer, and requests get 503 with the reason while no worker is there
run     until HTTP ends
stop    no new requests; those inside finish within the drain timeout, what is left is failed, and everything closes
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections import defaultdict
from pathlib import Path

from kvtransfer.ledger.handoffs import HandoffWriter
from kvtransfer.ledger.records import InventoryChange, LedgerAway, Snapshot, WorkerRecord
from kvtransfer.ledger.redis import RedisLedger
from kvtransfer.ledger.watcher import LedgerWatcher
from proto.control import Load, Role
from proto.errors import NoWorker, Overloaded
from proto.ids import Epoch, new_epoch
from proto.inventory import Cleared, Evicted, Stored
from proto.settings import CacheSettings, LedgerSettings, LogSettings, ModelSettings, RouterSettings, RpcSettings
from router.admission import Admission, seeds_from
from router.app import build_app
from router.attempt import Rules
from router.canary import Canary
from router.contract import Readiness
from router.deadlines import StageLimits
from router.flow import Flow
from router.models import Models
from router.observing import RouterListener, RouterPage
from router.policy import Ask, Goals, Weights, choose
from router.prefix_index import PrefixIndex
from router.registry import Registry
from service import logs
from service.http import HttpServer
from service.metrics import RouterMetrics, show_ledger
from service.process import CLOSE_S, run_service
from service.rpc import TlsFiles, WorkerClient
from service.tracing import StageFanOut

log = logging.getLogger(__name__)

_HUGE_PROMPT = 1 << 40
"""Too long for any cache: it is placed where both tiers are needed."""


class RouterService:
    """A ``service.process.Service``. ``stages`` may be given observers before ``start``."""

    def __init__(
        self,
        router: RouterSettings,
        ledger: LedgerSettings,
        model: ModelSettings,
        cache: CacheSettings,
        tls: TlsFiles | None = None,
    ) -> None:
        self._drain_s = router.drain_timeout
        self._is_draining = False
        self.epoch = new_epoch()
        self.stages = StageFanOut()
        self.metrics = RouterMetrics()
        self.index = PrefixIndex()
        self.models = Models(
            model,
            chat_template=router.chat_template,
            prefix_hash_key=cache.prefix_hash_key,
            on_served=lambda served: self.metrics.set_model(served.name),
        )
        self.registry = Registry(
            self.epoch,
            functools.partial(WorkerClient, tls=tls, on_refused=self.metrics.refused_message),
            self.models,
            time.monotonic,
            health_every_s=router.health_interval,
        )
        self._ledger = RedisLedger.from_settings(ledger)
        self._watcher = LedgerWatcher(
            self._ledger, workers_changed=self._workers_changed, inventory_changed=self._inventory_changed
        )
        self._handoffs = HandoffWriter(self._ledger)
        show_ledger(self.metrics, lambda: self._ledger.counts, lambda: self._handoffs.num_dropped)
        self._weights = Weights(disagg_threshold=router.disagg_threshold)
        self.flow = Flow(
            self.registry,
            self.index,
            Admission(self.epoch, router.max_inflight, seeds_from(model.seed)),
            rules_of(router),
            self._weights,
            RouterListener(self.metrics, self.stages, self._handoffs),
            goals=Goals(ttft_s=router.ttft_slo, itl_s=router.itl_slo),
        )
        self.registry.subscribe(self.flow)
        self._canary = Canary(
            self.flow,
            self.registry.view,
            lambda: self.models.current().card.vocab_size,
            router.canary_interval,
            time.monotonic,
        )
        page = RouterPage(self.metrics, self._refresh_gauges)
        self._http = HttpServer(
            build_app(router, self.flow, self.models, self.readiness, page),
            router.host,
            router.port,
            certificate=Path(router.ssl_certfile) if router.ssl_certfile else None,
            key=Path(router.ssl_keyfile) if router.ssl_keyfile else None,
        )
        self._known_epochs: set[Epoch] = set()

    @property
    def port(self) -> int:
        return self._http.port

    async def start(self) -> None:
        """Raises SetupError when the port is taken, or Redis does not let us in."""
        await self._http.start()
        with contextlib.suppress(LedgerAway):  # who watches it waits for it
            await self._ledger.connect()
        self._watcher.start()
        self._handoffs.start()
        log.info("router %s listens on port %d", self.epoch, self.port)

    async def run(self) -> None:
        await self._http.wait()

    async def stop(self) -> None:
        self._is_draining = True
        await self._canary.close()
        await self.flow.drain(self._drain_s)
        await self._http.stop(CLOSE_S / 2)
        await self._watcher.close()
        await self.registry.close()
        await self._handoffs.close()
        await self._ledger.close()

    def readiness(self) -> Readiness:
        """Ready when a request could be placed now, whatever its length, and KV travels."""
        reasons = self.registry.troubles()
        if not self._watcher.is_connected:
            reasons.append(f"the ledger in Redis is away: {self._watcher.trouble}; the last known workers are used")
        try:
            choose(self.registry.view(), Ask(num_tokens=_HUGE_PROMPT), self._weights)
            self.models.current()
            ready = not self._is_draining
        except NoWorker as error:
            ready = False
            reasons.insert(0, error.message)
        except Overloaded as error:
            ready = True
            reasons.insert(0, error.message)
        if self._is_draining:
            reasons.insert(0, "the router is shutting down")
        elif ready:
            ready = self._path_works(reasons)
        loads = self._loads()
        return Readiness(
            ready=ready,
            reasons=tuple(reasons),
            details={
                "prefill_workers": len(loads[Role.PREFILL]),
                "decode_workers": len(loads[Role.DECODE]),
                "inflight_requests": self.flow.num_inflight,
                "ledger_connected": self._watcher.is_connected,
            },
        )

    def _path_works(self, reasons: list[str]) -> bool:
        """What the canary says; before the first has come back, nothing is known to work."""
        verdict = self._canary.verdict()
        if verdict is not None and verdict.trouble:
            reasons.insert(0, f"the KV path does not work: {verdict.trouble}")
            return False
        if self._canary.is_pending:
            reasons.insert(0, "the KV path is being tried")
            return False
        return True

    def _loads(self) -> dict[Role, list[Load]]:
        loads: dict[Role, list[Load]] = defaultdict(list)
        view = self.registry.view()
        for worker in view.workers:
            if worker.is_usable and worker.layout == view.layout:
                loads[worker.role].append(worker.load)
        return loads

    def _refresh_gauges(self) -> None:
        self.metrics.set_inflight(self.flow.num_inflight)
        self.metrics.set_workers(self._loads())

    # From the ledger.

    def _workers_changed(self, records: list[WorkerRecord]) -> None:
        self.registry.records_changed(records)
        epochs = {record.epoch for record in records}
        for gone in self._known_epochs - epochs:
            self.index.drop(gone)
        self._known_epochs = epochs

    def _inventory_changed(self, epoch: Epoch, change: InventoryChange) -> None:
        match change:
            case Stored(hashes):
                self.index.stored(epoch, hashes)
            case Evicted(hashes):
                self.index.evicted(epoch, hashes)
            case Cleared():
                self.index.cleared(epoch)
            case Snapshot(hashes):
                self.index.snapshot(epoch, hashes)


def rules_of(router: RouterSettings) -> Rules:
    return Rules(
        request_timeout_s=router.request_timeout,
        max_attempts=router.max_attempts,
        max_buffered_tokens=router.max_buffered_tokens,
        lease_s=router.lease_s,
        limits=StageLimits(
            queued_s=router.queue_timeout,
            prefill_s=router.prefill_timeout,
            transfer_s=router.transfer_timeout,
            silence_s=router.silence_timeout,
        ),
    )


def run(
    router: RouterSettings,
    ledger: LedgerSettings,
    model: ModelSettings,
    log_settings: LogSettings,
    cache: CacheSettings,
    rpc: RpcSettings,
) -> int:
    """Runs a router until it is told to stop; returns the exit code. Of ``cache`` only ``prefix_hash_key`` matters.

    Raises SettingsError.
    """
    logs.setup(log_settings)
    service = RouterService(router, ledger, model, cache, TlsFiles.of(rpc, is_server=False))
    return run_service(service, drain_timeout=router.drain_timeout + CLOSE_S)
