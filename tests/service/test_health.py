"""Phases, and readiness by progress."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from service.health import Health, Phase


@dataclass
class Engine:
    """A heartbeat and a clock, both set by hand."""

    last_step_monotonic: float = 100.0
    is_working: bool = False
    now: float = 100.0


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def health(engine: Engine) -> Health:
    health = Health(stall_after_s=5.0, clock=lambda: engine.now)
    health.watch(lambda: engine)
    return health


def test_only_the_ready_phase_is_ready(health: Health) -> None:
    readiness = [health.report().is_ready]
    for enter in (lambda: health.loading("weights", 0.5), health.warming, health.ready, health.draining):
        enter()
        readiness.append(health.report().is_ready)
    assert readiness == [False, False, False, True, False]


def test_a_phase_says_what_it_is_at(health: Health) -> None:
    health.loading("loading weights", 0.25)
    report = health.report()
    assert (report.phase, report.detail, report.progress) == (Phase.LOADING, "loading weights", 0.25)


def test_an_engine_with_work_that_does_not_step_is_not_ready(health: Health, engine: Engine) -> None:
    health.ready()
    engine.is_working = True
    engine.now = 104.9
    assert health.report().is_ready
    engine.now = 106.0
    report = health.report()
    assert not report.is_ready
    assert report.phase is Phase.READY
    assert "no step for 6 s" in report.detail
    assert report.last_step_age_s == 6.0
    engine.last_step_monotonic = 106.0
    assert health.report().is_ready


def test_an_idle_engine_stays_ready(health: Health, engine: Engine) -> None:
    health.ready()
    engine.now = 10_000.0
    assert health.report().is_ready


def test_without_an_engine_the_phase_alone_counts() -> None:
    health = Health()
    assert health.report().last_step_age_s is None
    health.ready()
    assert health.report().is_ready


def test_failure_is_final(health: Health) -> None:
    health.failed("the engine crashed")
    health.ready()
    health.failed("and again")
    report = health.report()
    assert (report.phase, report.detail, report.is_ready) == (Phase.FAILED, "the engine crashed", False)
