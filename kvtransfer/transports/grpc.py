"""The link that always works: one bidirectional gRPC stream per hand-off, payloads inside the frames.

Messages are bytes to gRPC, so that a malformed one is our error with our name, and flow control is HTTP/2's own. One
task may send and one may receive at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import grpc
import grpc.aio

from kvtransfer.transport import Link, LinkLost
from proto.handoff import HandoffMessage
from proto.wire import decode_handoff, encode_handoff
from service.rpc import TlsFiles, channel

log = logging.getLogger(__name__)

SERVICE = "tandem.Handoff"
METHOD = "Exchange"
T = TypeVar("T")

CLOSE_S = 2.0
"""What the peer gets to read our last words before the connection is cut."""


class _Exchange:
    """Typed messages over gRPC's read and write, whose every end is a LinkLost.

    gRPC ends the whole call when a task that reads or writes is cancelled. So each runs in a task of its own, which
    the caller's cancellation leaves alone: a read that was started serves the next ``receive``.
    """

    def __init__(self, read: Callable[[], Awaitable[object]], write: Callable[[bytes], Awaitable[None]]) -> None:
        self._read = read
        self._write = write
        self._reading: asyncio.Future[object] | None = None
        self._writing: asyncio.Future[None] | None = None
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def is_closed(self) -> bool:
        return self._closed.done()

    @property
    def is_writing(self) -> bool:
        return self._writing is not None and not self._writing.done()

    async def send(self, message: HandoffMessage) -> None:
        if self.is_closed:
            raise LinkLost("the link is closed")
        self._writing = _watched(self._write(encode_handoff(message)))
        await self._ended(self._writing)

    async def receive(self) -> HandoffMessage:
        if self.is_closed:
            raise LinkLost("the link is closed")
        data = await self._next()
        if data is None:
            raise LinkLost("the peer has closed the link")
        return decode_handoff(data)

    async def drain(self) -> None:
        """After ``close``: reads to the end what nobody wants any more."""
        with contextlib.suppress(LinkLost):
            while await self._next(closed_too=True) is not None:
                pass

    def close(self) -> None:
        if not self._closed.done():
            self._closed.set_result(None)

    def cut(self) -> None:
        for task in (self._reading, self._writing):
            if task is not None:
                task.cancel()

    async def _next(self, *, closed_too: bool = False) -> bytes | None:
        """The next message's bytes; None at the end."""
        if self._reading is None:
            self._reading = _watched(self._read())
        data = await self._ended(self._reading, closed_too=closed_too)
        self._reading = None
        return data if isinstance(data, bytes) else None

    async def _ended(self, work: asyncio.Future[T], *, closed_too: bool = False) -> T:
        until: set[asyncio.Future[T] | asyncio.Future[None]] = {work} if closed_too else {work, self._closed}
        await asyncio.wait(until, return_when=asyncio.FIRST_COMPLETED)
        if not work.done() or work.cancelled():
            raise LinkLost("the link is closed")
        try:
            return work.result()
        except Exception as error:
            # grpc.aio's server side reports a broken stream with errors of its private core.
            if type(error).__module__.startswith("grpc") or isinstance(error, asyncio.InvalidStateError):
                raise LinkLost(_describe(error)) from error
            raise


def _watched(work: Awaitable[T]) -> asyncio.Future[T]:
    """A task whose failure may go unheard, where the link is closed before anyone asks."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


def _describe(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name.lower()}: {error.details()}"
    return str(error) or type(error).__name__


async def connect(address: str, tls: TlsFiles | None = None) -> Link:
    """A link to the decode worker at ``address`` (host:port). Raises LinkLost where it cannot be reached."""
    conduit = channel(address, tls)
    call: grpc.aio.StreamStreamCall[bytes, bytes] = conduit.stream_stream(f"/{SERVICE}/{METHOD}")()
    try:
        await call.wait_for_connection()
    except grpc.aio.AioRpcError as error:
        await conduit.close()
        raise LinkLost(_describe(error)) from error
    except BaseException:
        await conduit.close()
        raise
    return _ClientLink(conduit, call)


class _ClientLink:
    def __init__(self, conduit: grpc.aio.Channel, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        self._channel = conduit
        self._call = call
        self._exchange = _Exchange(call.read, call.write)

    async def send(self, message: HandoffMessage) -> None:
        await self._exchange.send(message)

    async def receive(self) -> HandoffMessage:
        return await self._exchange.receive()

    async def close(self) -> None:
        if self._exchange.is_closed:
            return
        self._exchange.close()
        try:
            if not self._exchange.is_writing:
                with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
                    async with asyncio.timeout(CLOSE_S):
                        await self._call.done_writing()
                        # What still comes is of no use; its end says that our last words were read.
                        await self._exchange.drain()
        finally:
            self._exchange.cut()
            self._call.cancel()
            await self._channel.close()


def handoff_handler(on_link: Callable[[Link], Awaitable[None]]) -> grpc.GenericRpcHandler:
    """The Handoff service. ``on_link`` serves one link; the stream ends when it returns.

    It is never cancelled: a lost peer is a LinkLost of the link, and what to do then is the hand-off's own decision.
    """
    servicer = _Servicer(on_link)
    return grpc.method_handlers_generic_handler(
        SERVICE, {METHOD: grpc.stream_stream_rpc_method_handler(servicer.exchange)}
    )


class _Servicer:
    def __init__(self, on_link: Callable[[Link], Awaitable[None]]) -> None:
        self._on_link = on_link
        self._serving: set[asyncio.Task[None]] = set()

    async def exchange(self, _requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        link = _ServerLink(context)
        task = asyncio.ensure_future(self._serve(link))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        try:
            await asyncio.shield(task)
        finally:
            await link.close()

    async def _serve(self, link: _ServerLink) -> None:
        try:
            await self._on_link(link)
        except Exception:
            log.exception("a hand-off ended by an error of ours")


class _ServerLink:
    def __init__(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        self._exchange = _Exchange(context.read, context.write)

    async def send(self, message: HandoffMessage) -> None:
        await self._exchange.send(message)

    async def receive(self) -> HandoffMessage:
        return await self._exchange.receive()

    async def close(self) -> None:
        self._exchange.close()
        self._exchange.cut()
