"""Offers requests to a server at their times. Knows clocks and concurrency; knows no HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar

from bench.outcome import Outcome

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Run:
    """Outcomes in the order of their requests. ``sent_s`` of each counts from the start of the run."""

    outcomes: tuple[Outcome, ...]
    duration_s: float


async def offer(
    requests: Sequence[R],
    arrivals: Sequence[float],
    send: Callable[[R], Awaitable[Outcome]],
    *,
    max_concurrency: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Run:
    """Sends each request when it is due and fewer than ``max_concurrency`` are open; returns when all have ended.

    A request's latency starts when it is sent: waiting for one's turn here is the client's time, not the server's.
    ``send`` must not raise, and stamps outcomes by ``clock``.
    """
    turn = asyncio.Semaphore(max_concurrency or max(1, len(requests)))
    start = clock()

    async def one(request: R) -> Outcome:
        async with turn:
            outcome = await send(request)
        return replace(outcome, sent_s=outcome.sent_s - start)

    async with asyncio.TaskGroup() as group:
        tasks: list[asyncio.Task[Outcome]] = []
        for request, due in zip(requests, arrivals, strict=True):
            if (wait := start + due - clock()) > 0:
                await sleep(wait)
            tasks.append(group.create_task(one(request)))
    return Run(tuple(task.result() for task in tasks), clock() - start)


def join(runs: Sequence[Run]) -> Run:
    """The runs as one, as if each had begun where the one before ended."""
    starts = accumulate((run.duration_s for run in runs), initial=0.0)
    moved = (
        replace(outcome, sent_s=outcome.sent_s + start)
        for run, start in zip(runs, starts, strict=False)
        for outcome in run.outcomes
    )
    return Run(tuple(moved), sum(run.duration_s for run in runs))
