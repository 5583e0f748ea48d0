"""Stages in order, whatever order their news comes in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.lifecycle import Stage, may_follow
from router.stages import StageClock, stages_between


def test_stages_in_between_are_passed_in_no_time() -> None:
    clock = StageClock(10.0)
    clock.advance(Stage.ROUTED, 11.0)
    steps = clock.advance(Stage.ADOPTED, 14.0)
    assert steps == [
        (Stage.ROUTED, 3.0, Stage.QUEUED),
        (Stage.QUEUED, 0.0, Stage.PREFILLING),
        (Stage.PREFILLING, 0.0, Stage.SEALED),
        (Stage.SEALED, 0.0, Stage.ADOPTED),
    ]
    assert clock.times[Stage.ROUTED] == 3.0


@pytest.mark.parametrize("late", [Stage.QUEUED, Stage.SEALED, Stage.STREAMING, Stage.ADOPTED])
def test_late_news_changes_nothing(late: Stage) -> None:
    clock = StageClock(0.0)
    for stage in (Stage.ROUTED, Stage.ADOPTED, Stage.DECODING):
        clock.advance(stage, 1.0)
    assert clock.advance(late, 2.0) == []
    assert clock.stage is Stage.DECODING


def test_a_new_try_adds_to_the_times() -> None:
    clock = StageClock(0.0)
    clock.advance(Stage.ROUTED, 1.0)
    clock.advance(Stage.QUEUED, 3.0)
    clock.advance(Stage.ROUTED, 4.0)
    clock.advance(Stage.QUEUED, 9.0)
    assert clock.times[Stage.ROUTED] == 7.0


@given(st.lists(st.sampled_from(Stage), max_size=30))
def test_every_step_is_lawful_and_time_is_accounted_for(news: list[Stage]) -> None:
    clock, now, seen = StageClock(0.0), 0.0, Stage.RECEIVED
    for stage in news:
        now += 1.0
        for previous, _, entered in clock.advance(stage, now):
            assert previous is seen
            assert may_follow(previous, entered)
            seen = entered
        assert clock.stage is seen
    assert sum(clock.times.values()) <= now


@pytest.mark.parametrize("terminal", [Stage.FINISHED, Stage.ABORTED, Stage.FAILED])
def test_nothing_follows_the_end(terminal: Stage) -> None:
    assert all(stages_between(terminal, stage) == () for stage in Stage)
