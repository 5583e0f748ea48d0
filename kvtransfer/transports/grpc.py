"""The link that always works: one bidirectional gRPC stream per hand-off, payloads inside the frames.

    one gRPC message:  a message of ``proto.wire``          or, where several small ones wait:
                       02 | (length, u32 | message of ``proto.wire``) ...

Messages are bytes to gRPC, so that a malformed one is our error with our name. What waits while gRPC writes leaves
together: a stream's cost is per message more than per byte. Flow control is HTTP/2's own. One task
may receive at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import grpc
import grpc.aio

from kvtransfer.transport import Link, LinkLost
from proto.errors import RemoteProtocolError
from proto.handoff import HandoffMessage
from proto.wire import decode_handoff, encode_handoff
from service.rpc import TlsFiles, channel

log = logging.getLogger(__name__)

SERVICE = "tandem.Handoff"
METHOD = "Exchange"
CLOSE_S = 2.0
"""What the peer gets to read our last words before the connection is cut."""
BATCH = 2
"""First byte of several messages in one; ``proto.wire`` has 0 and 1."""
MAX_BATCH_BYTES = 128 << 10
"""Larger messages go alone, uncopied."""
MAX_BUFFERED_BYTES = 1 << 20
"""What may wait to be written before ``send`` does."""
_LENGTH = struct.Struct(">I")

T = TypeVar("T")


class _Exchange:
    """Typed messages over gRPC's read and write, whose every end is a LinkLost.

    gRPC ends the whole call when a task that reads or writes is cancelled. So each runs in a task of its own, which
    the caller's cancellation leaves alone: a read that was started serves the next ``receive``.
    """

    def __init__(self, read: Callable[[], Awaitable[object]], write: Callable[[bytes], Awaitable[None]]) -> None:
        self._read = read
        self._write = write
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reading: asyncio.Future[object] | None = None
        self._arrived: deque[bytes | memoryview] = deque()
        self._writing: asyncio.Future[None] | None = None
        self._leaving: deque[bytes] = deque()
        self._num_leaving_bytes = 0
        self._has_room = asyncio.Event()
        self._broken: Exception | None = None

    @property
    def is_closed(self) -> bool:
        return self._closed.done()

    async def send(self, message: HandoffMessage) -> None:
        self._check_open()
        data = encode_handoff(message)
        self._leaving.append(data)
        self._num_leaving_bytes += len(data)
        if self._writing is None:
            self._writing = _watched(self._write_all())
        while self._num_leaving_bytes > MAX_BUFFERED_BYTES:
            self._has_room.clear()
            await self._unless_closed(_watched(self._has_room.wait()))
            self._check_open()

    async def receive(self) -> HandoffMessage:
        if self.is_closed:
            raise LinkLost("the link is closed")
        while not self._arrived:
            self._reading = self._reading or _watched(self._read())
            data = await self._unless_closed(self._reading)
            self._reading = None
            if not isinstance(data, bytes):
                raise LinkLost("the peer has closed the link")
            self._arrived.extend(_unpacked(data))
        return decode_handoff(self._arrived.popleft())

    def close(self) -> None:
        """Ends ``receive`` and ``send``. What was sent still leaves: see ``flush``."""
        if not self._closed.done():
            self._closed.set_result(None)

    async def flush(self) -> None:
        if self._writing is not None:
            await asyncio.wait({self._writing})

    async def drain(self) -> None:
        """After ``close``: reads to the end what nobody wants any more."""
        data: object = b""
        while isinstance(data, bytes):
            self._reading = self._reading or _watched(self._read())
            data, self._reading = await self._reading, None

    def cut(self) -> None:
        """What still runs, ends."""
        for task in (self._reading, self._writing):
            if task is not None:
                task.cancel()

    def _check_open(self) -> None:
        if self.is_closed:
            raise LinkLost("the link is closed")
        if self._broken is not None:
            raise LinkLost(_describe(self._broken)) from self._broken

    async def _write_all(self) -> None:
        try:
            while self._leaving:
                data = _packed(self._leaving)
                await self._write(data)
                self._num_leaving_bytes = sum(map(len, self._leaving))
                self._has_room.set()
        except Exception as error:
            self._broken = error
            self._leaving.clear()
        finally:
            self._writing = None
            self._has_room.set()

    async def _unless_closed(self, work: asyncio.Future[T]) -> T:
        until: set[asyncio.Future[T] | asyncio.Future[None]] = {work, self._closed}
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


def _packed(messages: deque[bytes]) -> bytes:
    """Takes the next gRPC message off ``messages``: as many of the first ones as are small together."""
    first = messages.popleft()
    num_bytes = len(first)
    batch = [first]
    while messages and num_bytes + len(messages[0]) <= MAX_BATCH_BYTES:
        num_bytes += len(messages[0])
        batch.append(messages.popleft())
    if len(batch) == 1:
        return first
    parts = [bytes((BATCH,))]
    for message in batch:
        parts += (_LENGTH.pack(len(message)), message)
    return b"".join(parts)


def _unpacked(data: bytes) -> list[bytes | memoryview]:
    """The messages of one gRPC message, as views. Raises RemoteProtocolError."""
    if not data or data[0] != BATCH:
        return [data]
    view, start = memoryview(data), 1
    messages: list[bytes | memoryview] = []
    while start < len(view):
        end = start + _LENGTH.size
        if end > len(view):
            raise RemoteProtocolError("a batch that ends within a length")
        start, end = end, end + _LENGTH.unpack_from(view, start)[0]
        if end > len(view):
            raise RemoteProtocolError("a batch that ends within a message")
        messages.append(view[start:end])
        start = end
    return messages


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
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await self._exchange.flush()
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
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await self._exchange.flush()
        finally:
            self._exchange.cut()
