"""A prefill worker as a process."""

from __future__ import annotations

from kvtransfer.fences import FenceTable
from kvtransfer.transport import Link
from kvtransfer.transports.choice import allowed_names
from kvtransfer.transports.grpc import connect
from prefill.handoff import Dispatcher
from prefill.tier import PrefillTier
from proto.control import Peer, Role
from proto.settings import EngineSettings, LedgerSettings, LogSettings, WorkerSettings
from service import logs as service_logs
from service.process import run_service
from worker.service import TOMBSTONE_S, TierParts, WorkerContext, WorkerService


async def _connect(peer: Peer) -> Link:
    return await connect(peer.address)


def _build(context: WorkerContext) -> TierParts:
    transports = allowed_names(context.settings.transports)
    fences = FenceTable(context.epoch, TOMBSTONE_S)
    dispatcher = Dispatcher(context.host, _connect, transports, epoch=context.epoch, refusals=fences.refusals)
    tier = PrefillTier(
        context.host,
        context.routers,
        dispatcher,
        fences,
        epoch=context.epoch,
        metrics=context.metrics,
        max_held=context.settings.max_held,
        orphaned=context.orphaned,
    )
    return tier, ()


def run(engine: EngineSettings, worker: WorkerSettings, ledger: LedgerSettings, logs: LogSettings) -> int:
    """Runs one prefill worker until a signal; returns the exit code."""
    service_logs.setup(logs)
    service = WorkerService(Role.PREFILL, engine, worker, ledger, _build)
    return run_service(service, drain_timeout=worker.drain_timeout)
