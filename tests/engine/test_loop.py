"""The engine's thread, with events in place of time."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Future

import pytest

from engine.core import EngineCore
from engine.loop import EngineLoop
from engine.output import StepOutput
from proto.errors import InvalidRequest, LocalProtocolError, Unavailable
from proto.hashing import BlockHasher
from proto.request import TokenOut
from tests.support.paged_engine import FakeMemory, FakeRunner, make_facts, make_request, oracle

WAIT = 20.0


class Harness:
    def __init__(self) -> None:
        self.facts = make_facts()
        memory = FakeMemory(self.facts)
        self.runner = FakeRunner(memory, self.facts)
        core = EngineCore(self.runner, memory, self.facts, BlockHasher("fake", self.facts.block_size))
        self.tokens: list[TokenOut] = []
        self.threads: set[int] = set()
        self.finished = threading.Event()
        self.crashed = threading.Event()
        self.crashes: list[BaseException] = []
        self.loop = EngineLoop(core, self.on_step, self.on_crash)

    def on_step(self, output: StepOutput) -> None:
        self.threads.add(threading.get_ident())
        self.tokens += output.tokens
        if any(token.finish for token in output.tokens):
            self.finished.set()

    def on_crash(self, error: BaseException) -> None:
        self.crashes.append(error)
        self.crashed.set()


def test_it_wakes_for_work_and_stops_between_steps() -> None:
    harness = Harness()
    harness.loop.start()
    for name in "ab":
        request = make_request(name, [3, 4, 5])
        harness.loop.call(lambda core, request=request: core.add(request)).result(WAIT)
        assert harness.finished.wait(WAIT)
        harness.finished.clear()
        assert harness.tokens == oracle(request, 0, harness.facts)
        harness.tokens.clear()
    assert len(harness.threads) == 1
    assert threading.get_ident() not in harness.threads
    assert harness.loop.stop(WAIT)
    assert harness.loop.stop(WAIT)
    assert harness.crashes == []


def test_calls_run_in_order_between_steps() -> None:
    harness = Harness()
    in_step, go_on = threading.Event(), threading.Event()

    def block() -> None:
        in_step.set()
        assert go_on.wait(WAIT)

    harness.runner.on_run = block
    harness.loop.call(lambda core: core.add(make_request("a", [3, 4], max_tokens=None, ignore_eos=True)))
    harness.loop.start()
    assert in_step.wait(WAIT)
    order: list[int] = []
    futures = [harness.loop.call(lambda _, i=i: order.append(i)) for i in range(5)]
    assert not any(future.done() for future in futures)
    assert harness.loop.heartbeat.is_working
    go_on.set()
    futures[-1].result(WAIT)
    assert order == [0, 1, 2, 3, 4]
    assert harness.loop.stop(WAIT)


def test_what_a_call_raises_is_its_callers_and_nobody_elses() -> None:
    harness = Harness()
    harness.loop.start()
    bad = harness.loop.call(lambda core: core.add(make_request("a", [3] * 99)))
    assert isinstance(bad.exception(WAIT), InvalidRequest)
    assert harness.loop.call(lambda core: core.is_idle()).result(WAIT)
    assert harness.loop.stop(WAIT)
    assert harness.crashes == []


def test_a_cancelled_call_is_not_run() -> None:
    harness = Harness()
    ran: list[str] = []
    first = harness.loop.call(lambda _: ran.append("first"))
    second = harness.loop.call(lambda _: ran.append("second"))
    assert first.cancel()
    harness.loop.start()
    second.result(WAIT)
    assert ran == ["second"]
    with pytest.raises(CancelledError):
        first.result(WAIT)
    assert harness.loop.stop(WAIT)


def test_a_crash_is_told_once_and_fails_everything_after_it() -> None:
    harness = Harness()
    cause = RuntimeError("device lost")
    queued: list[Future[None]] = []
    harness.runner.failures.append(cause)
    harness.runner.on_run = lambda: queued.append(harness.loop.call(lambda _: None))
    harness.loop.call(lambda core: core.add(make_request("a", [3, 4])))
    harness.loop.start()
    assert harness.crashed.wait(WAIT)
    assert harness.crashes == [cause]
    assert queued[0].exception(WAIT) is cause
    assert harness.loop.call(lambda core: core.is_idle()).exception(WAIT) is cause
    assert harness.loop.stop(WAIT)
    assert harness.crashes == [cause]
    assert not harness.loop.heartbeat.is_working


def test_an_owner_that_raises_is_a_crash_too() -> None:
    harness = Harness()
    crashed = threading.Event()
    loop = EngineLoop(harness.loop._core, lambda _: 1 / 0, lambda _: crashed.set())  # type: ignore[arg-type, return-value]
    loop.call(lambda core: core.add(make_request("a", [3, 4])))
    loop.start()
    assert crashed.wait(WAIT)
    assert isinstance(loop.call(lambda _: None).exception(WAIT), ZeroDivisionError)
    assert loop.stop(WAIT)


def test_stopping_runs_earlier_calls_and_refuses_later_ones() -> None:
    harness = Harness()
    hold, reached = threading.Event(), threading.Event()

    def wait(_: EngineCore) -> None:
        reached.set()
        assert hold.wait(WAIT)

    harness.loop.start()
    harness.loop.call(wait)
    assert reached.wait(WAIT)
    earlier = harness.loop.call(lambda _: "ran")
    assert not harness.loop.stop(0.0)
    later = harness.loop.call(lambda _: "never")
    assert isinstance(later.exception(WAIT), Unavailable)
    hold.set()
    assert harness.loop.stop(WAIT)
    assert earlier.result(WAIT) == "ran"


def test_a_loop_that_never_started_stops_too() -> None:
    harness = Harness()
    call = harness.loop.call(lambda _: None)
    assert harness.loop.stop(WAIT)
    assert isinstance(call.exception(WAIT), Unavailable)


def test_the_thread_cannot_wait_for_itself() -> None:
    harness = Harness()
    harness.loop.start()
    own = harness.loop.call(lambda _: harness.loop.stop(WAIT))
    assert isinstance(own.exception(WAIT), LocalProtocolError)
    assert harness.loop.stop(WAIT)


def test_it_sleeps_when_only_others_can_help() -> None:
    """Waiting work that lacks blocks others hold must not keep the thread spinning."""
    harness = Harness()
    harness.loop.start()
    room = harness.loop.call(lambda core: core.reserve("r", core._hasher.all_blocks([3] * 63), 63, 8)).result(WAIT)  # type: ignore[arg-type]
    assert room is not None
    request = make_request("a", [5] * 60, max_tokens=2)
    harness.loop.call(lambda core: core.add(request)).result(WAIT)
    # Two calls later at least one step was tried; after it there is none until the reservation ends.
    harness.loop.call(lambda core: core.has_work()).result(WAIT)
    assert not harness.loop.call(lambda core: core.has_work()).result(WAIT)
    assert harness.runner.batches == []
    harness.loop.call(lambda core: core.cancel("r")).result(WAIT)  # type: ignore[arg-type]
    assert harness.finished.wait(WAIT)
    assert harness.tokens == oracle(request, 0, harness.facts)
    assert harness.loop.stop(WAIT)
