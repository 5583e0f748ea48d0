"""A decode worker as a process: a worker that also takes hand-offs in."""

from __future__ import annotations

from collections.abc import Sequence

from decode.tier import DecodeTier
from kvtransfer.fences import FenceTable
from kvtransfer.receive_session import ReceiveSession
from kvtransfer.transport import Link
from kvtransfer.transports import PayloadReader
from kvtransfer.transports.choice import payload_readers
from kvtransfer.transports.grpc import handoff_handler
from proto.control import Role
from proto.settings import EngineSettings, LedgerSettings, LogSettings, WorkerSettings
from service import logs as service_logs
from service.process import run_service
from worker.host import EngineHost
from worker.service import TOMBSTONE_S, TierParts, WorkerContext, WorkerService


class HandoffServer:
    """Serves the links that prefill workers open, one receive session each."""

    def __init__(
        self, host: EngineHost, tier: DecodeTier, fences: FenceTable, readers: Sequence[PayloadReader]
    ) -> None:
        self._host = host
        self._tier = tier
        self._fences = fences
        self._readers = readers

    async def serve(self, link: Link) -> None:
        await ReceiveSession(link, self._host.parts.kv, self._tier, self._fences, readers=self._readers).run()


def _build(context: WorkerContext) -> TierParts:
    fences = FenceTable(context.epoch, TOMBSTONE_S)
    tier = DecodeTier(
        context.host, context.routers, fences, metrics=context.metrics, done_lease_s=context.settings.lease_s
    )
    server = HandoffServer(context.host, tier, fences, payload_readers(context.settings.transports))
    return tier, (handoff_handler(server.serve),)


def run(engine: EngineSettings, worker: WorkerSettings, ledger: LedgerSettings, logs: LogSettings) -> int:
    """Runs one decode worker until a signal; returns the exit code."""
    service_logs.setup(logs)
    service = WorkerService(Role.DECODE, engine, worker, ledger, _build)
    return run_service(service, drain_timeout=worker.drain_timeout)
