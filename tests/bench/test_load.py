"""Requests go out when they are due and when there is a turn; time here is a number that sleeping advances."""

from __future__ import annotations

import asyncio

import pytest

from bench.load import Run, join, offer
from bench.outcome import Failure, Outcome
from tests.bench.scripted import answer


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)  # what was started before does its first step at the time before
        self.now += seconds


async def test_requests_are_sent_when_due_and_kept_in_order() -> None:
    clock = Clock()

    async def send(number: int) -> Outcome:
        return answer(1.0, sent=clock()) if number else Failure(clock(), 0.1, "boom")

    run = await offer([0, 1, 2], [0.0, 1.5, 4.0], send, clock=clock, sleep=clock.sleep)
    assert [type(outcome).__name__ for outcome in run.outcomes] == ["Failure", "Answer", "Answer"]
    assert [outcome.sent_s for outcome in run.outcomes] == pytest.approx([0.0, 1.5, 4.0])
    assert run.duration_s == pytest.approx(4.0)


async def test_no_more_than_the_limit_are_open() -> None:
    num_open = peak = num_started = 0
    may_end = asyncio.Event()
    full = asyncio.Event()

    async def send(number: int) -> Outcome:
        nonlocal num_open, peak, num_started
        num_open += 1
        num_started += 1
        peak = max(peak, num_open)
        if num_open == 3:
            full.set()
        await may_end.wait()
        num_open -= 1
        return answer(1.0)

    running = asyncio.create_task(offer(list(range(10)), [0.0] * 10, send, max_concurrency=3))
    await full.wait()
    assert num_started == 3
    may_end.set()
    run = await running
    assert (peak, num_started, len(run.outcomes)) == (3, 10, 10)


async def test_nothing_to_send_is_a_run_too() -> None:
    async def send(number: int) -> Outcome:
        raise AssertionError(number)

    assert (await offer([], [], send)).outcomes == ()


def test_joined_runs_follow_each_other() -> None:
    one = Run((answer(1.0, sent=0.5),), 3.0)
    two = Run((answer(1.0, sent=0.25), Failure(0.75, 0.1, "boom")), 2.0)
    whole = join([one, two])
    assert whole.duration_s == 5.0
    assert [outcome.sent_s for outcome in whole.outcomes] == [0.5, 3.25, 3.75]
    assert join([one]) == one
