"""Server-sent events: a response that sends frames as they come, notices a client that left, and cleans up after both.

Knows the event format and ASGI; knows nothing of what the frames say.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.openai.errors import ClientGone

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # or nginx collects the events instead of passing them on
}

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def event(value: Mapping[str, object]) -> bytes:
    """One ``data:`` frame holding ``value`` as JSON."""
    return b"data: " + _encode(value).encode("utf-8", "replace") + b"\n\n"


async def until_gone(receive: Receive, work: Coroutine[object, object, T]) -> T:
    """The result of ``work``, which is cancelled when the client leaves first. Raises ClientGone then.

    The request's body must have been read: from then on ``receive`` only tells of the end.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await _cancel(task)
        await _cancel(gone)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: asyncio.Future[T]) -> None:
    """Waits until ``task`` is over; its own result or error, if any, is nobody's business any more."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


class Frames:
    """Frames from a generator, with comments in the silence between them if ``keep_alive_s`` is positive."""

    def __init__(self, source: AsyncGenerator[bytes, None], keep_alive_s: float = 0.0) -> None:
        self._source = source
        self._keep_alive_s = keep_alive_s
        self._pending: asyncio.Task[bytes] | None = None

    async def next(self) -> bytes:
        """The next frame, or a comment when there is none for a while. Raises StopAsyncIteration at the end."""
        if self._keep_alive_s <= 0:
            return await anext(self._source)
        if self._pending is None:
            self._pending = asyncio.ensure_future(_step(self._source))
        done, _ = await asyncio.wait({self._pending}, timeout=self._keep_alive_s)
        if not done:
            return KEEP_ALIVE
        task, self._pending = self._pending, None
        frame = task.result()
        if not frame:
            raise StopAsyncIteration
        return frame

    async def aclose(self) -> None:
        """Ends the generator, wherever it waits. Idempotent."""
        if self._pending is not None:
            await _cancel(self._pending)
            self._pending = None
        await self._source.aclose()


async def _step(source: AsyncGenerator[bytes, None]) -> bytes:
    """The next frame, or nothing at the end: a task cannot end in StopAsyncIteration."""
    return await anext(source, b"")


class SseResponse(Response):
    """Sends ``first`` and then the rest of ``frames``. An error on the way becomes a last event, by ``on_error``.

    ``frames`` is closed in the end in every case: sent out, failed, client gone, or server shutting down.
    """

    def __init__(
        self,
        first: bytes,
        frames: Frames,
        *,
        headers: Mapping[str, str],
        on_error: Callable[[Exception], bytes],
        on_end: Callable[[], Awaitable[None]],
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({**HEADERS, **headers})
        self._first = first
        self._frames = frames
        self._on_error = on_error
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(receive, self._send_all(send))
        except (ClientGone, OSError):
            pass  # the client closed the connection: nobody is left to tell
        finally:
            try:
                await self._frames.aclose()
            finally:
                await self._on_end()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        frame = self._first
        try:
            while True:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
                frame = await self._frames.next()
        except StopAsyncIteration:
            last = DONE
        except OSError:
            raise
        except Exception as error:
            last = self._on_error(error) + DONE
        await send({"type": "http.response.body", "body": last, "more_body": False})
