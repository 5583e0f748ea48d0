"""A decode worker as a process: a worker that also takes hand-offs in."""

from __future__ import annotations

from decode.tier import DecodeTier
from kvtransfer.fences import FenceTable
from kvtransfer.transports.choice import payload_readers
from kvtransfer.transports.grpc import handoff_handler
from proto.control import Role
from proto.settings import EngineSettings, LedgerSettings, LogSettings, WorkerSettings
from service import logs as service_logs
from service.process import run_service
from worker.service import TOMBSTONE_S, TierParts, WorkerContext, WorkerService


def _build(context: WorkerContext) -> TierParts:
    fences = FenceTable(context.epoch, TOMBSTONE_S)
    tier = DecodeTier(
        context.host,
        context.routers,
        fences,
        payload_readers(context.settings.transports),
        metrics=context.metrics,
        done_lease_s=context.settings.lease_s,
        orphaned=context.orphaned,
    )
    return tier, (handoff_handler(tier.serve),)


def run(engine: EngineSettings, worker: WorkerSettings, ledger: LedgerSettings, logs: LogSettings) -> int:
    """Runs one decode worker until a signal; returns the exit code."""
    service_logs.setup(logs)
    service = WorkerService(Role.DECODE, engine, worker, ledger, _build)
    return run_service(service, drain_timeout=worker.drain_timeout)
