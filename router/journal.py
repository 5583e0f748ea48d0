"""What is known of one request, and who is told as it changes. Knows stages and counts; decides nothing."""

from __future__ import annotations

from proto.ids import WorkerId
from proto.lifecycle import Stage
from proto.request import Request
from router.assembly import TokenAssembly
from router.attempt import Listener, RequestEnd, Try
from router.contract import StageTimes
from router.policy import Decision
from router.stages import StageChange, StageClock
from router.timers import Timers


class Journal:
    def __init__(self, request: Request, label: str, listener: Listener, timers: Timers) -> None:
        self.label = label
        self.num_cached = 0
        self.num_bytes_moved = 0
        self.prefill_worker: WorkerId | None = None
        """Who computed the prompt, last."""
        self.decode_worker: WorkerId | None = None
        self._request = request
        self._listener = listener
        self._timers = timers
        self._arrived = timers.time()
        self._clock = StageClock(self._arrived)

    @property
    def stage(self) -> Stage:
        return self._clock.stage

    @property
    def times(self) -> StageTimes:
        return self._clock.times

    def placed(self, current: Try, decision: Decision) -> None:
        """``current`` is the try that ``decision`` made."""
        self.prefill_worker = (current.prefill or decision.decode).worker
        self.decode_worker = decision.decode.worker
        if current.generation == 1:
            self._listener.placed(local=decision.local)

    def advance(self, stage: Stage, current: Try) -> None:
        """The request is in ``stage`` now; late news changes nothing."""
        now = self._timers.time()
        for previous, seconds, entered in self._clock.advance(stage, now):
            self._listener.stage_changed(
                StageChange(
                    request=self._request.id,
                    label=self.label,
                    generation=current.generation,
                    previous=previous,
                    stage=entered,
                    seconds=seconds,
                    at=now,
                    prefill=current.prefill.epoch if current.prefill else None,
                    decode=current.decode.epoch if current.decode else None,
                )
            )

    def close(self, assembly: TokenAssembly) -> None:
        """Says how it went. Once, after the last ``advance``."""
        self._listener.ended(
            RequestEnd(
                request=self._request,
                label=self.label,
                stage=self.stage,
                finishes=assembly.finishes(),
                num_generated=sum(assembly.positions()),
                num_longest=max(assembly.positions()),
                num_cached=self.num_cached,
                num_bytes_moved=self.num_bytes_moved,
                num_duplicates=assembly.num_duplicates,
                total_s=self._timers.time() - self._arrived,
                times=self.times,
            )
        )
