"""A decode worker as a process: a worker that also takes hand-offs in."""

from __future__ import annotations

from decode.tier import DecodeTier
from kvtransfer.fences import FenceTable
from kvtransfer.transports.choice import allowed_names, payload_readers
from kvtransfer.transports.grpc import handoff_handler
from proto.control import Role
from proto.settings import EngineSettings, LedgerSettings, LogSettings, RpcSettings, WorkerSettings
from service import logs as service_logs
from service.process import CLOSE_S, run_service
from worker.service import TOMBSTONE_S, TierParts, WorkerContext, WorkerService


def _build(context: WorkerContext) -> TierParts:
    transports = allowed_names(context.settings.transports, context.tls, nccl_beside_tls=context.rpc.nccl_beside_tls)
    fences = FenceTable(context.epoch, TOMBSTONE_S, context.refusals)
    tier = DecodeTier(
        context.host,
        context.routers,
        fences,
        payload_readers(transports, context.epoch, context.tls),
        metrics=context.metrics,
        orphaned=context.orphaned,
    )
    return tier, (handoff_handler(tier.serve),)


def run(
    engine: EngineSettings, worker: WorkerSettings, ledger: LedgerSettings, logs: LogSettings, rpc: RpcSettings
) -> int:
    """Runs one decode worker until a signal; returns the exit code. Raises SettingsError."""
    service_logs.setup(logs)
    service = WorkerService(Role.DECODE, engine, worker, ledger, _build, rpc)
    return run_service(service, drain_timeout=worker.drain_timeout + CLOSE_S)
