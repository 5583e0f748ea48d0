"""A worker's side of the Worker service: what it says of itself, and one stream per router.

Knows how a stream starts and ends; the tier says Welcome and serves the messages.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import grpc.aio

from proto.control import FromRouter, FromWorker, Hello, ModelCard
from proto.errors import RemoteFault, RemoteProtocolError, TandemError, Unavailable, UserError
from proto.health import HealthReport
from proto.ids import Epoch
from proto.wire import decode_from_router, encode_card, encode_from_worker, encode_health
from service.rpc.duplex import DEFAULT_OUTBOX, Duplex, StreamClosed

log = logging.getLogger(__name__)

SERVICE = "tandem.Worker"
HELLO_TIMEOUT_S = 10.0
LAST_WORDS_S = 5.0
"""What a stream gets to deliver what was queued, and its server to notice that the stream is over."""


class RouterStream:
    """One router's stream, from its Hello on. The first message to send is Welcome."""

    def __init__(self, hello: Hello, duplex: Duplex[FromRouter, FromWorker]) -> None:
        self.hello = hello
        self._duplex = duplex

    @property
    def router_epoch(self) -> Epoch:
        return self.hello.router_epoch

    @property
    def is_closed(self) -> bool:
        return self._duplex.is_ended

    async def receive(self) -> FromRouter:
        """The next message. Raises StreamClosed at the end, at once when the router dies. One caller at a time."""
        return await self._duplex.receive()

    def send(self, message: FromWorker) -> None:
        """Queues ``message``; never blocks. Dropped after the end; a router that does not read loses its stream."""
        self._duplex.send(message)

    def close(self, reason: str) -> None:
        """Ends the stream now; what is still queued is lost."""
        self._duplex.end(reason)


def worker_handler(
    describe: Callable[[], Awaitable[ModelCard]],
    health: Callable[[], Awaitable[HealthReport]],
    on_stream: Callable[[RouterStream], Awaitable[None]],
    max_outbox: int = DEFAULT_OUTBOX,
    *,
    on_malformed: Callable[[], None] = lambda: None,
) -> grpc.GenericRpcHandler:
    """The Worker service. A TandemError raised by any of the three is the caller's answer.

    ``on_stream`` serves one stream, and is over soon after ``receive`` raised StreamClosed. When it returns, what it
    has queued is still delivered, and the stream ends. ``on_malformed`` is called for each message that cannot be
    decoded, or that is not the Hello which comes first.
    """
    servicer = _Servicer(describe, health, on_stream, max_outbox, on_malformed)
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "Describe": grpc.unary_unary_rpc_method_handler(servicer.describe),
            "Health": grpc.unary_unary_rpc_method_handler(servicer.health),
            "Serve": grpc.stream_stream_rpc_method_handler(servicer.serve),
        },
    )


class _Servicer:
    def __init__(
        self,
        describe: Callable[[], Awaitable[ModelCard]],
        health: Callable[[], Awaitable[HealthReport]],
        on_stream: Callable[[RouterStream], Awaitable[None]],
        max_outbox: int,
        on_malformed: Callable[[], None],
    ) -> None:
        self._describe = describe
        self._health = health
        self._on_stream = on_stream
        self._max_outbox = max_outbox
        self._on_malformed = on_malformed

    async def describe(self, _request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        try:
            return encode_card(await self._describe())
        except TandemError as error:
            await context.abort(_status(error), error.message)
            raise

    async def health(self, _request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        try:
            return encode_health(await self._health())
        except TandemError as error:
            await context.abort(_status(error), error.message)
            raise

    async def serve(self, _requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        async def read() -> bytes | None:
            data = await context.read()
            return data if isinstance(data, bytes) else None

        peer = f"router at {context.peer()}"
        duplex = Duplex(
            peer,
            read,
            context.write,
            encode_from_worker,
            decode_from_router,
            self._max_outbox,
            on_malformed=self._on_malformed,
        )
        duplex.start()
        try:
            hello = await self._first_message(duplex)
            await self._serve_until_the_end(RouterStream(hello, duplex), duplex, peer)
        except StreamClosed:
            if duplex.fault is not None:
                await context.abort(_status(duplex.fault), duplex.fault.message)
        except TandemError as error:
            await context.abort(_status(error), error.message)
        finally:
            await duplex.aclose("the worker ended the stream")

    async def _first_message(self, duplex: Duplex[FromRouter, FromWorker]) -> Hello:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await duplex.receive()
        except TimeoutError:
            raise RemoteProtocolError(f"no Hello within {HELLO_TIMEOUT_S:g} s") from None
        if not isinstance(first, Hello):
            self._on_malformed()
            raise RemoteProtocolError(f"{type(first).__name__} where Hello comes first")
        return first

    async def _serve_until_the_end(
        self, stream: RouterStream, duplex: Duplex[FromRouter, FromWorker], peer: str
    ) -> None:
        """``on_stream`` gets a task of its own: when the router dies gRPC cancels ours; the tier sees StreamClosed."""
        serving = asyncio.ensure_future(self._on_stream(stream))
        try:
            await asyncio.shield(serving)
        except asyncio.CancelledError:
            duplex.end(f"{peer} is gone")
            _, late = await asyncio.wait({serving}, timeout=LAST_WORDS_S)
            for task in late:
                log.error("a stream's server did not notice its end: %s", peer)
                task.cancel()
            raise
        if duplex.fault is not None:
            raise duplex.fault
        async with asyncio.timeout(LAST_WORDS_S):
            await duplex.flush()


def _status(error: TandemError) -> grpc.StatusCode:
    match error:
        case Unavailable():
            return grpc.StatusCode.UNAVAILABLE
        case UserError() | RemoteProtocolError():
            return grpc.StatusCode.INVALID_ARGUMENT
        case RemoteFault():
            return grpc.StatusCode.FAILED_PRECONDITION
        case _:
            return grpc.StatusCode.INTERNAL
