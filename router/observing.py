"""What happens to requests, told to metrics, to stage observers and to the ledger. Knows who wants to know what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from kvtransfer.ledger.records import HandoffRecord
from proto.errors import TandemError
from proto.ids import RequestId
from proto.lifecycle import NOT_BEGUN, Stage
from proto.request import FinishReason, TokenOut
from router.attempt import RequestEnd
from router.recovery import Remedy
from router.stages import StageChange
from service.metrics import RequestSummary, RouterMetrics
from service.tracing import StageObserver


class HandoffLog(Protocol):
    """``kvtransfer.ledger.handoffs.HandoffWriter``: queues, never raises."""

    def advance(self, record: HandoffRecord) -> None: ...


class RouterListener:
    """``attempt.Listener`` for a router. Latencies are counted from a request's arrival on the router's own clock."""

    def __init__(self, metrics: RouterMetrics, stages: StageObserver, handoffs: HandoffLog) -> None:
        self._metrics = metrics
        self._stages = stages
        self._handoffs = handoffs
        self._last_token: dict[RequestId, dict[int, float]] = {}
        self._arrived: dict[RequestId, float] = {}

    def stage_changed(self, change: StageChange) -> None:
        if change.previous is Stage.RECEIVED:
            arrived = change.at - change.seconds
            self._arrived[change.request] = arrived
            self._stages.entered(change.request, Stage.RECEIVED, arrived)
        self._stages.entered(change.request, change.stage, change.at)
        self._metrics.stage_left(change.previous, change.seconds)
        self._handoffs.advance(
            HandoffRecord(
                request=change.request,
                generation=change.generation,
                stage=change.stage,
                prefill_epoch=change.prefill,
                decode_epoch=change.decode,
            )
        )

    def placed(self, *, local: bool) -> None:
        self._metrics.routed(local=local)

    def recovering(self, remedy: Remedy) -> None:
        self._metrics.recovered("retry" if remedy is Remedy.RESTART else remedy.value)

    def tokens_came(self, tokens: Sequence[TokenOut], at: float) -> None:
        request = tokens[0].request
        last = self._last_token.get(request)
        if last is None:
            last = self._last_token[request] = {}
            self._metrics.first_token(at - self._arrived.get(request, at))
        together: dict[int, int] = {}
        for out in tokens:
            together[out.choice] = together.get(out.choice, 0) + 1
        for choice, count in together.items():
            if choice in last:
                self._metrics.next_token(at - last[choice], count)
            last[choice] = at

    def turned_away(self, error: TandemError) -> None:
        self._metrics.rejected(error.kind)

    def refused(self, reason: str) -> None:
        self._metrics.refused_message(reason)

    def ended(self, end: RequestEnd) -> None:
        self._arrived.pop(end.request.id, None)
        self._last_token.pop(end.request.id, None)
        if end.stage is Stage.ABORTED:
            self._metrics.disconnected()
        self._metrics.finished(summary_of(end))


def summary_of(end: RequestEnd) -> RequestSummary:
    params = end.request.params
    return RequestSummary(
        finish=_finish_of(end),
        num_prompt_tokens=len(end.request.prompt),
        num_generated=end.num_generated,
        num_longest=end.num_longest,
        total_s=end.total_s,
        max_tokens=params.max_tokens,
        num_choices=params.n,
        num_cached=end.num_cached,
        num_bytes_moved=end.num_bytes_moved,
        num_duplicates=end.num_duplicates,
        queue_s=_seconds(end, Stage.QUEUED),
        prefill_s=_seconds(end, Stage.PREFILLING, Stage.STREAMING),
        decode_s=_seconds(end, Stage.DECODING),
        inference_s=_seconds(end, *(stage for stage in Stage if stage not in NOT_BEGUN)),
    )


def _finish_of(end: RequestEnd) -> FinishReason:
    if end.stage is Stage.ABORTED:
        return FinishReason.ABORT
    if end.stage is Stage.FAILED:
        return FinishReason.ERROR
    return FinishReason.STOP if FinishReason.STOP in end.finishes else FinishReason.LENGTH


def _seconds(end: RequestEnd, *stages: Stage) -> float | None:
    known = [end.times[stage] for stage in stages if stage in end.times]
    return sum(known) if known else None


class RouterPage:
    """The HTTP side's ``contract.MetricsLike``: ``refresh`` sets the gauges just before they are read."""

    def __init__(self, metrics: RouterMetrics, refresh: Callable[[], None]) -> None:
        self._metrics = metrics
        self._refresh = refresh

    def exposition(self) -> tuple[bytes, str]:
        self._refresh()
        return self._metrics.exposition()

    def http_request(self, handler: str, method: str, status: int, seconds: float) -> None:
        self._metrics.http_request(handler, method, status, seconds)

    def stage(self, name: str, seconds: float) -> None:
        self._metrics.stage(name, seconds)
