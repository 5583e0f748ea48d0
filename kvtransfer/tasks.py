"""Waiting, and work that a cancellation may not cut in half. Knows asyncio only."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

OFF_LOOP_BYTES = 128 * 1024
"""From this many bytes on, copying and summing is worth a thread: it would stall the event loop for longer."""


async def wait_until(event: asyncio.Event, deadline: float, clock: Callable[[], float]) -> None:
    """Returns when ``event`` is set (and clears it), or at ``deadline`` on ``clock`` (infinity: never)."""
    try:
        async with asyncio.timeout(None if math.isinf(deadline) else max(0.0, deadline - clock())):
            await event.wait()
    except TimeoutError:
        return
    event.clear()


async def to_the_end(work: Awaitable[T], on_cancel: Callable[[], None]) -> T:
    """Awaits ``work`` to its end even if the caller is cancelled, and raises the cancellation then.

    ``on_cancel`` is called at each cancellation, to make ``work`` hurry.
    """
    task = asyncio.ensure_future(work)
    cancellation: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancellation = error
            on_cancel()
    if cancellation is not None:
        if not task.cancelled() and (fault := task.exception()) is not None:
            raise fault from cancellation
        raise cancellation
    return task.result()


async def stop(*tasks: asyncio.Task[None]) -> None:
    """Cancels ``tasks`` and waits for their ends. Their own exceptions are theirs to have reported."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def off_loop(work: Callable[[], T], num_bytes: int) -> T:
    """Runs ``work`` in a thread where it touches many bytes, and never leaves it running behind a cancellation."""
    if num_bytes < OFF_LOOP_BYTES:
        return work()
    return await to_the_end(asyncio.to_thread(work), lambda: None)
