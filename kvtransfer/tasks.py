"""Waiting, and work that a cancellation may not cut in half. Knows asyncio only."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
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


async def in_thread(work: Callable[[], T], too_late: Callable[[T], None] = lambda result: None) -> T:
    """Runs ``work`` in a thread of its own, for work that may hang: neither a cancellation nor the process's end waits.

    What comes after a cancellation goes to ``too_late``.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(result: T) -> None:
        if future.cancelled():
            too_late(result)
        else:
            future.set_result(result)

    def fail(error: BaseException) -> None:
        if not future.cancelled():
            future.set_exception(error)

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed, and with it all who waited
            try:
                result = work()
            except BaseException as error:
                loop.call_soon_threadsafe(fail, error)
            else:
                loop.call_soon_threadsafe(deliver, result)

    threading.Thread(target=run, name="transfer", daemon=True).start()
    return await future
