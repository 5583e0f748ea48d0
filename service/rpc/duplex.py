"""One bidirectional stream of typed messages: sending never waits, and its end is noticed at once.

                    ┌──────────┐
    send() ───────▶ │ outbox   │ ──▶ write     bounded: a peer that does not read loses its stream
    receive() ◀──── │ inbox    │ ◀── read      bounded: a reader that lags slows its peer down
                    └──────────┘

Both sides of the router's stream are one of these. Knows nothing of gRPC but that reading and writing may raise.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import grpc

from proto.errors import RemoteProtocolError

log = logging.getLogger(__name__)
In = TypeVar("In")
Out = TypeVar("Out")
DEFAULT_OUTBOX = 8192
INBOX = 256


class StreamClosed(Exception):
    """The stream has ended; nothing more comes or goes. Its text says why."""


class Duplex(Generic[In, Out]):
    """``read`` returns the next message's bytes, or None at the end; ``write`` returns once the transport took them.

    ``start`` once, on the loop that uses it; ``end`` at any time, any number of times. ``on_malformed`` is called where
    the peer sent what cannot be decoded, which ends the stream.
    """

    def __init__(
        self,
        peer: str,
        read: Callable[[], Awaitable[bytes | None]],
        write: Callable[[bytes], Awaitable[None]],
        encode: Callable[[Out], bytes],
        decode: Callable[[bytes], In],
        max_outbox: int = DEFAULT_OUTBOX,
        *,
        on_malformed: Callable[[], None] = lambda: None,
    ) -> None:
        self._peer = peer
        self._read = read
        self._write = write
        self._encode = encode
        self._decode = decode
        self._max_outbox = max_outbox
        self._on_malformed = on_malformed
        self._outbox: deque[bytes] = deque()
        self._outbox_changed = asyncio.Event()
        self._flushed = asyncio.Event()
        self._inbox: asyncio.Queue[In | None] = asyncio.Queue(INBOX)
        self._ended = asyncio.Event()
        self._reason = ""
        self._fault: RemoteProtocolError | None = None
        self._tasks: tuple[asyncio.Task[None], ...] = ()

    def start(self) -> None:
        self._flushed.set()
        self._tasks = (
            asyncio.create_task(self._read_on(), name=f"read {self._peer}"),
            asyncio.create_task(self._write_on(), name=f"write {self._peer}"),
        )

    @property
    def is_ended(self) -> bool:
        return self._ended.is_set()

    @property
    def fault(self) -> RemoteProtocolError | None:
        """What the peer did wrong, if that ended the stream."""
        return self._fault

    def send(self, message: Out) -> None:
        """Queues ``message``. After the end it is dropped. A full outbox ends the stream."""
        if self.is_ended:
            return
        if len(self._outbox) >= self._max_outbox:
            reason = f"{self._peer} left {len(self._outbox)} messages unread"
            log.warning("closing a stream: %s", reason)
            self.end(reason)
            return
        self._outbox.append(self._encode(message))
        self._flushed.clear()
        self._outbox_changed.set()

    async def receive(self) -> In:
        """The next message. Raises StreamClosed after the last that came before the end. One caller at a time."""
        while True:
            if self.is_ended and self._inbox.empty():
                raise StreamClosed(self._reason)
            message = await self._inbox.get()
            if message is not None:
                return message

    async def flush(self) -> None:
        """Waits until all that was sent is with the transport, or the stream has ended."""
        await self._flushed.wait()

    async def wait_ended(self) -> None:
        """Waits for the end, whoever makes it."""
        await self._ended.wait()

    def end(self, reason: str) -> None:
        """Stops both directions; what was not yet written is lost. The first reason stays."""
        if self.is_ended:
            return
        self._reason = reason
        self._ended.set()
        self._outbox.clear()
        self._flushed.set()
        if self._inbox.empty():
            self._inbox.put_nowait(None)  # wakes a waiting receive()
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()

    async def aclose(self, reason: str) -> None:
        """``end``, and waits until no task of this stream runs."""
        self.end(reason)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _read_on(self) -> None:
        try:
            while (data := await self._read()) is not None:
                await self._inbox.put(self._decode(data))
        except RemoteProtocolError as error:
            log.warning("%s broke the protocol: %s", self._peer, error)
            self._fault = error
            self._on_malformed()
            self.end(f"{self._peer} broke the protocol: {error}")
        except Exception as error:
            self.end(f"{self._peer} is lost: {describe_rpc_error(error)}")
        else:
            self.end(f"{self._peer} closed the stream")

    async def _write_on(self) -> None:
        try:
            while True:
                while self._outbox:
                    await self._write(self._outbox.popleft())
                self._flushed.set()
                self._outbox_changed.clear()
                await self._outbox_changed.wait()
        except Exception as error:
            # Not yet the end: what the peer said before it went is still to be read, and the read loop finds the end.
            log.debug("cannot write to %s: %s", self._peer, describe_rpc_error(error))
            self._flushed.set()


def describe_rpc_error(error: BaseException) -> str:
    """One line, without gRPC's debug dump."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name.lower()}: {error.details()}"
    return str(error) or type(error).__name__
