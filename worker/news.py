"""What a tier says of a request to its router, in words both tiers share."""

from __future__ import annotations

import asyncio
import logging

from proto.control import Failed, Progress, Rejected, RejectReason
from proto.errors import LocalFault, NotFinite, Overloaded, TandemError, UserError
from proto.ids import Generation, RequestId
from proto.lifecycle import Stage
from service.metrics import WorkerMetrics
from worker.routers import RouterStreams
from worker.stages import StageClock

log = logging.getLogger(__name__)


class News:
    def __init__(self, routers: RouterStreams, metrics: WorkerMetrics) -> None:
        self._routers = routers
        self._metrics = metrics

    def progress(
        self,
        request: RequestId,
        generation: Generation,
        clock: StageClock,
        stage: Stage,
        *,
        num_cached: int = 0,
        num_bytes: int = 0,
        duration_s: float | None = None,
    ) -> None:
        """The request enters ``stage``. ``duration_s``: what the stage it leaves took, if not what the clock says."""
        left, spent = clock.stage, clock.enter(stage)
        self._metrics.stage_left(left, spent)
        told = spent if duration_s is None else duration_s
        self._routers.send(request, Progress(request, generation, stage, num_cached, num_bytes, told))

    def reject(
        self,
        request: RequestId,
        generation: Generation,
        reason: RejectReason,
        message: str,
        retry_after_s: float | None = None,
        *,
        held: bool = False,
    ) -> None:
        self._routers.send(request, Rejected(request, generation, reason, message, retry_after_s, held))

    def fail(self, request: RequestId, generation: Generation, error: TandemError) -> None:
        """The request itself cannot be served here."""
        failed = Failed(request, generation, error.status, error.kind, error.message, error.param)
        self._routers.send(request, failed)

    def fail_not_finite(self, request: RequestId, generation: Generation) -> None:
        log.error("request %s: its logits are not finite; it is given up here", request)
        self.fail(request, generation, NotFinite("The model gave logits that are not finite for this request."))

    async def was_admitted(
        self, request: RequestId, generation: Generation, answer: asyncio.Future[None]
    ) -> TandemError | None:
        """Waits for the engine's answer; tells the router, and returns, why it took the request not."""
        try:
            await answer
        except Overloaded as full:
            self.reject(request, generation, RejectReason.FULL, full.message, full.retry_after_s)
            return full
        except UserError as error:
            self.fail(request, generation, error)
            return error
        except Exception as fault:
            # The engine is gone, or has a bug, or we have one: not the request's doing as far as we know, so another
            # worker may try.
            log.error("request %s could not be given to the engine: %s", request, fault)
            self.reject(request, generation, RejectReason.UNKNOWN, "the engine failed")
            return LocalFault("the engine failed")
        return None
