"""The router's stream to one incarnation of a worker: kept up as long as it is wanted.

Knows connecting, pauses and the end of streams; what is said on them is the caller's.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Protocol

from proto.control import FromRouter, FromWorker, Hello, ModelCard, Welcome
from proto.errors import TandemError
from service.rpc import StreamClosed

log = logging.getLogger(__name__)
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 3.0


class StreamLike(Protocol):
    @property
    def welcome(self) -> Welcome: ...

    def send(self, message: FromRouter) -> None: ...

    async def receive(self) -> FromWorker: ...

    async def close(self) -> None: ...


class ClientLike(Protocol):
    """``service.rpc.WorkerClient``."""

    async def describe(self) -> ModelCard: ...

    async def connect(self, hello: Hello) -> StreamLike: ...

    async def close(self) -> None: ...


class LinkEvents(Protocol):
    """Called on the event loop. Between ``up`` and ``down``, and only there, messages come."""

    async def greeted(self, client: ClientLike, welcome: Welcome) -> None:
        """The worker has answered; what must be known before it is used is found out here. A TandemError hangs up."""

    def up(self) -> None: ...

    def received(self, message: FromWorker) -> None: ...

    def down(self, reason: str) -> None: ...


class WorkerLink:
    """Connects, and connects again with growing pauses, until closed. Owns ``client``."""

    def __init__(self, client: ClientLike, hello: Hello, events: LinkEvents, *, first_pause_s: float = FIRST_PAUSE_S):
        self._client = client
        self._hello = hello
        self._events = events
        self._first_pause_s = first_pause_s
        self._stream: StreamLike | None = None
        self._task: asyncio.Task[None] | None = None
        self._nudged = asyncio.Event()
        self.trouble = "not connected yet"
        """Why there is no stream; empty while there is one."""

    @property
    def is_up(self) -> bool:
        return self._stream is not None

    def start(self, name: str) -> None:
        self._task = asyncio.create_task(self._run(), name=name)

    def send(self, message: FromRouter) -> None:
        """Dropped while there is no stream."""
        if self._stream is not None:
            self._stream.send(message)

    def nudge(self) -> None:
        """There is reason to think that the worker can be reached now: end a pause."""
        self._nudged.set()

    async def close(self) -> None:
        """``down`` is called if it was up. May be called twice."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            await self._client.close()

    async def _run(self) -> None:
        pause = self._first_pause_s
        while True:
            was_up = await self._serve()
            pause = self._first_pause_s if was_up else min(pause * 2, LONGEST_PAUSE_S)
            await self._rest(pause * random.uniform(0.8, 1.2))

    async def _serve(self) -> bool:
        """One stream, from Hello to its end; whether it came up."""
        try:
            stream = await self._client.connect(self._hello)
        except TandemError as error:
            self.trouble = error.message
            return False
        try:
            await self._events.greeted(self._client, stream.welcome)
            self._stream, self.trouble = stream, ""
            self._events.up()
            while True:
                self._hear(await stream.receive())
        except (StreamClosed, TandemError) as end:
            self.trouble = str(end)
        finally:
            was_up, self._stream = self._stream is not None, None
            if was_up:
                self._events.down(self.trouble or "closed by the router")
            await stream.close()
        return was_up

    def _hear(self, message: FromWorker) -> None:
        """A bug met in one message must not cost every request of this worker."""
        try:
            self._events.received(message)
        except Exception:
            log.exception("could not take %s from a worker", type(message).__name__)

    async def _rest(self, seconds: float) -> None:
        self._nudged.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._nudged.wait()
        except TimeoutError:
            pass
