"""Stage observers: fan-out and timing."""

from __future__ import annotations

import logging

import pytest

from proto.ids import RequestId
from proto.lifecycle import Stage
from service.tracing import StageFanOut, StageTimer

A, B = RequestId("r.1"), RequestId("r.2")


class Notes:
    def __init__(self) -> None:
        self.seen: list[tuple[RequestId, Stage, float]] = []

    def entered(self, request: RequestId, stage: Stage, at: float) -> None:
        self.seen.append((request, stage, at))


class Broken:
    def entered(self, request: RequestId, stage: Stage, at: float) -> None:
        raise ValueError("broken")


def test_every_observer_hears_every_stage_even_beside_a_broken_one(caplog: pytest.LogCaptureFixture) -> None:
    first, last = Notes(), Notes()
    fan_out = StageFanOut([first, Broken()])
    fan_out.add(last)
    with caplog.at_level(logging.ERROR):
        fan_out.entered(A, Stage.QUEUED, 1.0)
    assert first.seen == last.seen == [(A, Stage.QUEUED, 1.0)]
    assert "observer" in caplog.text


def test_the_timer_tells_each_stage_when_it_is_left() -> None:
    left: list[tuple[Stage, float]] = []
    timer = StageTimer(lambda stage, seconds: left.append((stage, seconds)))
    timer.entered(A, Stage.RECEIVED, 1.0)
    timer.entered(B, Stage.RECEIVED, 2.0)
    timer.entered(A, Stage.ROUTED, 3.0)
    timer.entered(B, Stage.FAILED, 2.5)
    timer.entered(A, Stage.FINISHED, 7.0)
    assert left == [(Stage.RECEIVED, 2.0), (Stage.RECEIVED, 0.5), (Stage.ROUTED, 4.0)]
    assert len(timer) == 0
