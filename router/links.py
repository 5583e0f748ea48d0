"""The router's stream to one incarnation of a worker: kept up as long as it is wanted.

    connecting ──▶ up ──breaks──▶ broken ──the same incarnation answers at once──▶ up (``back``)
        ▲                           └── it does not ──▶ down
        └──────────── pauses, growing ───────────────────┘

What is sent while the stream is broken is kept until then. While it is up, the worker is asked now and then how it is.
Knows connecting, pauses and the end of streams; what is said on them is the caller's.
"""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Protocol

from proto.control import FromRouter, FromWorker, Hello, ModelCard, Welcome
from proto.errors import LocalFault, TandemError
from proto.health import HealthReport
from service.rpc import StreamClosed

log = logging.getLogger(__name__)
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 3.0
BREAK_PAUSE_S = 0.02
"""Between a stream's end and the try to have it back."""
BREAK_S = 1.0
"""How long a worker may take to answer that try: what it works for waits meanwhile."""
HEALTH_EVERY_S = 2.0


class StreamLike(Protocol):
    @property
    def welcome(self) -> Welcome: ...

    def send(self, message: FromRouter) -> None: ...

    async def receive(self) -> FromWorker: ...

    async def close(self) -> None: ...


class ClientLike(Protocol):
    """``service.rpc.WorkerClient``."""

    async def describe(self) -> ModelCard: ...

    async def health(self) -> HealthReport: ...

    async def connect(self, hello: Hello) -> StreamLike: ...

    async def close(self) -> None: ...


class LinkEvents(Protocol):
    """Called on the event loop. Between ``up`` and ``down``, and only there, messages come; between them ``back`` may
    come too: the stream had broken, so messages may be missing."""

    async def greeted(self, client: ClientLike, welcome: Welcome) -> None:
        """The worker has answered; what must be known before it is used is found out here. A TandemError hangs up."""

    def up(self) -> None: ...

    def back(self) -> None: ...

    def received(self, message: FromWorker) -> None: ...

    def probed(self, report: HealthReport | None) -> None:
        """How the worker says it is; None: it did not say so in time."""

    def down(self, reason: str) -> None: ...


class WorkerLink:
    """Connects, and connects again with growing pauses, until closed. Owns ``client``."""

    def __init__(
        self,
        client: ClientLike,
        hello: Hello,
        events: LinkEvents,
        *,
        first_pause_s: float = FIRST_PAUSE_S,
        health_every_s: float = HEALTH_EVERY_S,
    ) -> None:
        self._client = client
        self._hello = hello
        self._events = events
        self._first_pause_s = first_pause_s
        self._health_every_s = health_every_s
        self._stream: StreamLike | None = None
        self._is_broken = False
        self._kept: list[FromRouter] = []
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
        """Kept while the stream is broken; dropped while there is none."""
        if self._stream is not None:
            self._stream.send(message)
        elif self._is_broken:
            self._kept.append(message)

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
        try:
            while True:
                was_up = await self._serve()
                while was_up:
                    self._is_broken = True
                    await self._rest(BREAK_PAUSE_S)
                    was_up = await self._serve()
                    pause = self._first_pause_s
                self._give_up(self.trouble)
                await self._rest(pause * random.uniform(0.8, 1.2))
                pause = min(pause * 2, LONGEST_PAUSE_S)
        finally:
            self._give_up("closed by the router")

    def _give_up(self, reason: str) -> None:
        """It will not be back in a moment."""
        was_broken, self._is_broken, self._kept = self._is_broken, False, []
        if was_broken:
            self._events.down(reason)

    async def _serve(self) -> bool:
        """One stream, from Hello to its end; whether it came up."""
        try:
            async with asyncio.timeout(BREAK_S if self._is_broken else None):
                stream = await self._client.connect(self._hello)
        except TimeoutError:
            return False
        except TandemError as error:
            self.trouble = error.message
            return False
        probing: asyncio.Task[None] | None = None
        try:
            await self._greet(stream)
            self._came_up(stream)
            probing = asyncio.create_task(self._probe(), name="health of a worker")
            while True:
                self._hear(await stream.receive())
        except (StreamClosed, TandemError) as end:
            self.trouble = str(end)
        finally:
            was_up, self._stream = self._stream is not None, None
            self._is_broken = self._is_broken or was_up
            if probing is not None:
                probing.cancel()
            await stream.close()
        return was_up

    async def _greet(self, stream: StreamLike) -> None:
        """A bug met in what one worker shows must not cost the link to it. Raises TandemError."""
        try:
            await self._events.greeted(self._client, stream.welcome)
        except TandemError:
            raise
        except Exception as error:
            what = f"what it shows cannot be used: {type(error).__name__}: {error}"
            if what != self.trouble:  # it is asked again every few seconds
                log.exception("could not take what worker %s shows", stream.welcome.worker)
            raise LocalFault(what) from error

    def _came_up(self, stream: StreamLike) -> None:
        was_broken, self._is_broken = self._is_broken, False
        kept, self._kept = self._kept, []
        self._stream, self.trouble = stream, ""
        for message in kept:
            stream.send(message)
        if was_broken:
            self._events.back()
        else:
            self._events.up()

    async def _probe(self) -> None:
        """Asks the worker how it is, as long as the stream lasts."""
        while True:
            await asyncio.sleep(self._health_every_s)
            try:
                report: HealthReport | None = await self._client.health()
            except TandemError:
                report = None
            self._events.probed(report)

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
