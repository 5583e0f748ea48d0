"""A router's side of the Worker service: one client per worker, and one stream to it while both live.

Every failure to reach a worker is NoWorker: nothing is wrong with the request, another worker may take it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NoReturn, TypeVar

import grpc.aio
from grpc.aio import StreamStreamMultiCallable, UnaryUnaryMultiCallable

from proto.control import FromRouter, FromWorker, Hello, ModelCard, Welcome
from proto.errors import NoWorker, RemoteProtocolError
from proto.health import HealthReport
from proto.wire import decode_card, decode_from_worker, decode_health, encode_from_router
from service.rpc.connection import SILENCE_S, TlsFiles, channel
from service.rpc.duplex import DEFAULT_OUTBOX, Duplex, StreamClosed, describe_rpc_error
from service.rpc.worker import SERVICE

CONNECT_TIMEOUT_S = 5.0
HEALTH_TIMEOUT_S = 5.0
DESCRIBE_TIMEOUT_S = 60.0
FLUSH_TIMEOUT_S = 1.0
T = TypeVar("T")


class WorkerStream:
    """The router's end of a stream, after Hello and Welcome."""

    def __init__(
        self,
        welcome: Welcome,
        duplex: Duplex[FromWorker, FromRouter],
        call: grpc.aio.StreamStreamCall[bytes, bytes],
    ) -> None:
        self.welcome = welcome
        self._duplex = duplex
        self._call = call

    @property
    def is_closed(self) -> bool:
        return self._duplex.is_ended

    def send(self, message: FromRouter) -> None:
        """Queues ``message``; never blocks. Dropped after the end, of which ``receive`` and ``is_closed`` tell."""
        self._duplex.send(message)

    async def receive(self) -> FromWorker:
        """The next message. Raises StreamClosed at the end, at once when the worker dies. One caller at a time."""
        return await self._duplex.receive()

    async def close(self) -> None:
        """Delivers what is queued, for a moment, and ends the stream. May be called twice."""
        try:
            async with asyncio.timeout(FLUSH_TIMEOUT_S):
                await self._duplex.flush()
                if not self._duplex.is_ended:
                    await self._call.done_writing()
                    # Cancelling now would overtake what is on its way; the worker ends the stream once it has read all.
                    await self._duplex.wait_ended()
        except (TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the worker is gone or does not listen, so there is no one to be polite to
        await self._duplex.aclose("closed by the router")
        self._call.cancel()


class WorkerClient:
    """Speaks to the worker at ``address`` (host:port). ``close`` it; calls after that fail.

    ``on_refused`` hears of each of its messages that was not taken: ``malformed``, or of a ``foreign_epoch``.
    """

    def __init__(
        self,
        address: str,
        tls: TlsFiles | None = None,
        max_outbox: int = DEFAULT_OUTBOX,
        silence_s: float = SILENCE_S,
        *,
        on_refused: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.address = address
        self._max_outbox = max_outbox
        self._on_refused = on_refused
        self._channel = channel(address, tls, silence_s)
        self._describe: UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(f"/{SERVICE}/Describe")
        self._health: UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(f"/{SERVICE}/Health")
        self._serve: StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(f"/{SERVICE}/Serve")

    async def describe(self, timeout_s: float = DESCRIBE_TIMEOUT_S) -> ModelCard:
        """Raises NoWorker, or RemoteProtocolError when the answer makes no sense."""
        try:
            return self._decoded(decode_card, await self._describe(b"", timeout=timeout_s))
        except grpc.aio.AioRpcError as error:
            self._unreachable(describe_rpc_error(error), error)

    async def health(self, timeout_s: float = HEALTH_TIMEOUT_S) -> HealthReport:
        """Raises NoWorker, or RemoteProtocolError when the answer makes no sense."""
        try:
            return self._decoded(decode_health, await self._health(b"", timeout=timeout_s))
        except grpc.aio.AioRpcError as error:
            self._unreachable(describe_rpc_error(error), error)

    async def connect(self, hello: Hello, timeout_s: float = CONNECT_TIMEOUT_S) -> WorkerStream:
        """Says Hello and waits for Welcome.

        Raises NoWorker when there is none in time, or when another incarnation answers than ``hello.worker_epoch``;
        RemoteProtocolError when something else than Welcome comes first.
        """
        call = self._serve()

        async def read() -> bytes | None:
            data = await call.read()
            return data if isinstance(data, bytes) else None

        duplex = Duplex(
            f"worker at {self.address}",
            read,
            call.write,
            encode_from_router,
            decode_from_worker,
            self._max_outbox,
            on_malformed=self._malformed,
        )
        duplex.start()
        duplex.send(hello)
        try:
            async with asyncio.timeout(timeout_s):  # wait_for may lose a cancellation, in Python 3.11
                welcome = await duplex.receive()
            self._check(welcome, hello)
        except BaseException as error:
            try:
                await duplex.aclose("no welcome")
            finally:
                call.cancel()
            if isinstance(error, TimeoutError):
                self._unreachable(f"no answer within {timeout_s:g} s", error)
            if isinstance(error, StreamClosed):
                self._unreachable(str(error), error)
            raise
        assert isinstance(welcome, Welcome)
        return WorkerStream(welcome, duplex, call)

    def _check(self, welcome: FromWorker, hello: Hello) -> None:
        if not isinstance(welcome, Welcome):
            self._malformed()
            raise RemoteProtocolError(f"{self.address} sent {type(welcome).__name__} where Welcome comes first")
        if hello.worker_epoch and welcome.epoch != hello.worker_epoch:
            self._on_refused("foreign_epoch")
            raise NoWorker(f"{self.address} is another process now: epoch {welcome.epoch}, not {hello.worker_epoch}")

    def _decoded(self, decode: Callable[[bytes], T], data: bytes) -> T:
        try:
            return decode(data)
        except RemoteProtocolError:
            self._malformed()
            raise

    def _malformed(self) -> None:
        self._on_refused("malformed")

    def _unreachable(self, why: str, cause: BaseException) -> NoReturn:
        raise NoWorker(f"cannot reach the worker at {self.address}: {why}") from cause

    async def close(self) -> None:
        """Ends every call and the connection. May be called twice."""
        await self._channel.close()
