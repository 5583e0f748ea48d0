"""A stream of events is sent, kept alive, cut off when its client leaves, and cleaned up in every case."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from starlette.types import Message

from router.openai.errors import ClientGone
from router.sse import DONE, KEEP_ALIVE, Frames, SseResponse, event, until_gone


class Wire:
    """An ASGI server's side: collects what is sent; ``leave`` is the client closing the connection."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.left = asyncio.Event()
        self.got_frame = asyncio.Event()

    async def receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.got_frame.set()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


class Source:
    """Frames that can wait or fail, and tell when they were closed."""

    def __init__(self, *frames: bytes | Exception | asyncio.Event) -> None:
        self._frames = frames
        self.num_ends = 0
        self.was_closed = False

    async def frames(self) -> AsyncGenerator[bytes, None]:
        try:
            for frame in self._frames:
                if isinstance(frame, asyncio.Event):
                    await frame.wait()
                elif isinstance(frame, Exception):
                    raise frame
                else:
                    yield frame
        finally:
            self.was_closed = True

    async def end(self) -> None:
        self.num_ends += 1

    async def response(self, keep_alive_s: float = 0.0) -> SseResponse:
        frames = Frames(self.frames(), keep_alive_s)
        return SseResponse(
            await frames.next(),
            frames,
            headers={"x-more": "1"},
            on_error=lambda error: event({"error": str(error)}),
            on_end=self.end,
        )


def test_an_event_is_one_line_of_json() -> None:
    assert event({"a": "é\n\n", "b": None}) == 'data: {"a":"é\\n\\n","b":null}\n\n'.encode()
    assert event({"a": "\ud800"}).startswith(b"data: ")


async def test_frames_are_sent_in_order_and_done_comes_last() -> None:
    wire, source = Wire(), Source(b"1", b"2", b"3")
    await (await source.response())({"type": "http"}, wire.receive, wire.send)
    assert wire.body == b"123" + DONE
    headers = dict(wire.sent[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"x-accel-buffering"] == b"no"
    assert headers[b"x-more"] == b"1"
    assert [message.get("more_body") for message in wire.sent[1:]] == [True, True, True, False]
    assert (source.num_ends, source.was_closed) == (1, True)


async def test_an_error_on_the_way_is_the_last_event_but_one() -> None:
    wire, source = Wire(), Source(b"1", ValueError("x"))
    await (await source.response())({"type": "http"}, wire.receive, wire.send)
    assert wire.body == b"1" + event({"error": "x"}) + DONE
    assert source.num_ends == 1


async def test_a_client_that_leaves_ends_the_generator_at_once() -> None:
    wire, source = Wire(), Source(b"1", asyncio.Event())
    task = asyncio.create_task((await source.response())({"type": "http"}, wire.receive, wire.send))
    await wire.got_frame.wait()
    wire.left.set()
    await task
    assert wire.body == b"1"
    assert (source.num_ends, source.was_closed) == (1, True)


async def test_a_send_that_fails_ends_it_too() -> None:
    source = Source(b"1", asyncio.Event())

    async def broken(message: Message) -> None:
        raise OSError

    await (await source.response())({"type": "http"}, Wire().receive, broken)
    assert (source.num_ends, source.was_closed) == (1, True)


async def test_a_client_that_does_not_read_holds_the_generator_and_can_still_leave() -> None:
    wire, source, stuck = Wire(), Source(b"1", b"2", b"3"), asyncio.Event()

    async def send(message: Message) -> None:
        wire.sent.append(message)
        if message["type"] == "http.response.body":
            stuck.set()
            await asyncio.Event().wait()

    task = asyncio.create_task((await source.response())({"type": "http"}, wire.receive, send))
    await stuck.wait()
    wire.left.set()
    await task
    assert wire.body == b"1"
    assert (source.num_ends, source.was_closed) == (1, True)


async def test_a_server_that_stops_ends_it_too() -> None:
    wire, source = Wire(), Source(b"1", asyncio.Event())
    task = asyncio.create_task((await source.response())({"type": "http"}, wire.receive, wire.send))
    await wire.got_frame.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (source.num_ends, source.was_closed) == (1, True)


async def test_silence_is_filled_with_comments_without_losing_a_frame() -> None:
    gate = asyncio.Event()
    source = Source(b"1", gate, b"2")
    frames = Frames(source.frames(), 0.001)
    assert await frames.next() == b"1"
    assert await frames.next() == KEEP_ALIVE
    assert await frames.next() == KEEP_ALIVE
    gate.set()
    while (frame := await frames.next()) == KEEP_ALIVE:
        pass
    assert frame == b"2"
    with pytest.raises(StopAsyncIteration):
        await frames.next()
    await frames.aclose()


async def test_closing_in_silence_stops_the_waiting() -> None:
    source = Source(asyncio.Event())
    frames = Frames(source.frames(), 0.001)
    assert await frames.next() == KEEP_ALIVE
    await frames.aclose()
    await frames.aclose()
    assert source.was_closed


async def test_work_is_cancelled_when_the_client_leaves_first() -> None:
    wire, started, cleaned = Wire(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            cleaned.set()

    task = asyncio.create_task(until_gone(wire.receive, work()))
    await started.wait()
    wire.left.set()
    with pytest.raises(ClientGone):
        await task
    assert cleaned.is_set()


async def test_work_that_is_done_first_gives_its_result_or_error() -> None:
    async def good() -> int:
        return 7

    async def bad() -> int:
        raise KeyError("x")

    assert await until_gone(Wire().receive, good()) == 7
    with pytest.raises(KeyError):
        await until_gone(Wire().receive, bad())
