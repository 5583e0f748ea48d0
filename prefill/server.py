"""A prefill worker as a process."""

from __future__ import annotations

from functools import partial

import grpc

from kvtransfer.fences import FenceTable
from kvtransfer.transport import Link
from kvtransfer.transports import NCCL
from kvtransfer.transports.choice import allowed_names
from kvtransfer.transports.grpc import connect
from prefill.handoff import Dispatcher
from prefill.tier import PrefillTier
from proto.control import Peer, Role
from proto.settings import EngineSettings, LedgerSettings, LogSettings, RpcSettings, WorkerSettings
from service import logs as service_logs
from service.process import CLOSE_S, run_service
from service.rpc import TlsFiles
from worker.service import TOMBSTONE_S, TierParts, WorkerContext, WorkerService


async def _connect(tls: TlsFiles | None, peer: Peer) -> Link:
    return await connect(peer.address, tls)


def _build(context: WorkerContext) -> TierParts:
    transports = allowed_names(context.settings.transports, context.tls, nccl_beside_tls=context.rpc.nccl_beside_tls)
    fences = FenceTable(context.epoch, TOMBSTONE_S, context.refusals)
    dispatcher = Dispatcher(
        context.host,
        partial(_connect, context.tls),
        transports,
        epoch=context.epoch,
        refusals=context.refusals,
        address=context.address,
    )
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
    return tier, _doors(context, transports)


def _doors(context: WorkerContext, transports: tuple[str, ...]) -> tuple[grpc.GenericRpcHandler, ...]:
    """What decode workers may come to us for."""
    if NCCL not in transports:
        return ()
    from kvtransfer.transports.door import NcclDoor

    return (NcclDoor(context.epoch, lambda: context.host.parts.kv, context.refusals).handler(),)


def run(
    engine: EngineSettings, worker: WorkerSettings, ledger: LedgerSettings, logs: LogSettings, rpc: RpcSettings
) -> int:
    """Runs one prefill worker until a signal; returns the exit code. Raises SettingsError."""
    service_logs.setup(logs)
    service = WorkerService(Role.PREFILL, engine, worker, ledger, _build, rpc)
    return run_service(service, drain_timeout=worker.drain_timeout + CLOSE_S)
