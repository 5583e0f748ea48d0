"""Where a request is, and for how long it was where: ``proto.lifecycle`` driven by news that comes over two streams.

News of a stage may be missing or arrive late (the decode worker's ADOPTED overtakes the prefill worker's SEALED). So a
stage that is further on is reached through those in between, in no time, and one that is behind is dropped. Knows
stages and seconds; the caller brings the clock.
"""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import dataclass

from proto.ids import Epoch, Generation, RequestId
from proto.lifecycle import Stage, may_follow


@dataclass(frozen=True, slots=True, kw_only=True)
class StageChange:
    """A request left ``previous``, after ``seconds`` in it, for ``stage``; at ``at`` on the router's clock."""

    request: RequestId
    label: str
    generation: Generation
    previous: Stage
    stage: Stage
    seconds: float
    at: float
    prefill: Epoch | None
    """The prefill worker of this try, while there is one; so for ``decode``."""
    decode: Epoch | None


@functools.cache
def stages_between(stage: Stage, target: Stage) -> tuple[Stage, ...]:
    """The shortest lawful way from ``stage`` to ``target``, which it ends with; empty where there is none."""
    if may_follow(stage, target):
        return (target,)
    ways: deque[tuple[Stage, ...]] = deque([(stage,)])
    seen = {stage, Stage.ROUTED, Stage.ABORTED, Stage.FAILED}
    while ways:
        way = ways.popleft()
        for following in Stage:
            if following in seen or not may_follow(way[-1], following):
                continue
            if following is target:
                return (*way[1:], following)
            seen.add(following)
            ways.append((*way, following))
    return ()


class StageClock:
    """The stage of one request. Starts in RECEIVED at ``now``."""

    def __init__(self, now: float) -> None:
        self.stage = Stage.RECEIVED
        self.times: dict[Stage, float] = {}
        self._since = now

    def advance(self, target: Stage, now: float) -> list[tuple[Stage, float, Stage]]:
        """Moves to ``target``: the steps taken, each (stage left, seconds in it, stage entered). Empty: late news.

        ROUTED may follow itself: it is another try.
        """
        if target is self.stage and target is not Stage.ROUTED:
            return []
        steps = []
        for following in stages_between(self.stage, target):
            seconds = max(0.0, now - self._since)
            self.times[self.stage] = self.times.get(self.stage, 0.0) + seconds
            steps.append((self.stage, seconds, following))
            self.stage = following
            self._since = now
        return steps
