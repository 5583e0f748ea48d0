"""An engine on its own thread, as the event loop sees it.

    event loop ── call(fn) ──▶ engine thread        runs between two steps, answers by a future
    event loop ◀── started / stepped / crashed ──   one hop per step, however many requests it served

Neither side ever waits for the other. Knows nothing of tiers, hand-offs or routers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeVar

from engine.build import EngineParts, build_core, load_engine_parts
from engine.core import EngineCore
from engine.kv_memory import KvMemory
from engine.loop import EngineLoop, StepHeartbeat
from engine.output import StepOutput
from engine.stats import EngineStats
from proto.control import Load
from proto.ids import RequestId
from proto.inventory import CacheChange
from proto.settings import EngineSettings

log = logging.getLogger(__name__)
T = TypeVar("T")

_STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class StepNews:
    """What one step did, and how the engine stands after it."""

    output: StepOutput
    load: Load
    stats: EngineStats


class EngineEvents(Protocol):
    """What a tier hears from its engine. Called on the event loop, in the engine's order."""

    def started(self, request: RequestId) -> None:
        """The request's first chunk is about to run."""

    def stepped(self, news: StepNews) -> None: ...

    def load_changed(self, load: Load) -> None:
        """A call changed it, between two steps."""

    def cache_changed(self, events: list[CacheChange]) -> None: ...

    def crashed(self, error: BaseException) -> None:
        """The engine thread is gone, and every request with it."""


class EngineHost:
    """Loads an engine and drives it. ``open`` once, then ``call``; ``close`` may be called twice."""

    def __init__(self, settings: EngineSettings, events: EngineEvents) -> None:
        self._settings = settings
        self._events = events
        self._parts: EngineParts | None = None
        self._loop: EngineLoop | None = None
        self._asyncio: asyncio.AbstractEventLoop | None = None

    @property
    def parts(self) -> EngineParts:
        assert self._parts is not None, "open() comes first"
        return self._parts

    async def open(self, on_phase: Callable[[str, float], None]) -> None:
        """Loads weights, sizes the KV memory, warms up and starts stepping. Raises SetupError."""
        self._asyncio = asyncio.get_running_loop()
        self._parts = await asyncio.to_thread(load_engine_parts, self._settings, on_phase)
        core = build_core(self._parts, self._settings, on_started=self._on_started)
        kv = self._parts.kv
        self._loop = EngineLoop(core, on_step=lambda output: self._on_step(core, kv, output), on_crash=self._on_crash)
        self._loop.start()

    def post(self, fn: Callable[[EngineCore], T]) -> asyncio.Future[T]:
        """Runs ``fn`` on the engine thread between two steps, in the order of the calls.

        The future has its result or its exception. Cancelling it does not take the call back.
        """
        return asyncio.shield(asyncio.wrap_future(self._send(fn)))

    async def call(self, fn: Callable[[EngineCore], T]) -> T:
        """``post``, and waits."""
        return await self.post(fn)

    def tell(self, fn: Callable[[EngineCore], None]) -> None:
        """``post`` for a call that has nothing to say, such as letting go; after the engine's end it does nothing."""
        if self._loop is not None:
            self._send(fn).add_done_callback(_log_fault)

    def _send(self, fn: Callable[[EngineCore], T]) -> Future[T]:
        assert self._loop is not None, "open() comes first"

        def run_and_collect(core: EngineCore) -> T:
            try:
                return fn(core)
            finally:
                self._collect_cache_events(core)
                load = core.load()
                self._hop(lambda: self._events.load_changed(load))

        return self._loop.call(run_and_collect)

    @property
    def heartbeat(self) -> StepHeartbeat | None:
        """When the last step ended and whether there is work; None before the engine is up."""
        return self._loop.heartbeat if self._loop else None

    def condemn(self, error: BaseException) -> None:
        """The engine cannot go on, for a reason that was found elsewhere: as if its thread had crashed."""
        self._events.crashed(error)

    async def close(self) -> None:
        """Ends the thread and gives the memory back; a step that does not end keeps the memory it writes into."""
        has_ended = True
        if self._loop is not None:
            has_ended = self._loop.stop(0) or await asyncio.to_thread(self._loop.stop, _STOP_TIMEOUT_S)
            self._loop = None
        if self._parts is not None and has_ended:
            self._parts.kv.close()
        self._parts = None

    # The engine thread, from here on.

    def _on_started(self, request: RequestId) -> None:
        self._hop(lambda: self._events.started(request))

    def _on_step(self, core: EngineCore, kv: KvMemory, output: StepOutput) -> None:
        if output.filled:
            kv.fence()
        news = StepNews(output, core.load(), core.stats)
        self._hop(lambda: self._events.stepped(news))
        self._collect_cache_events(core)

    def _on_crash(self, error: BaseException) -> None:
        self._hop(lambda: self._events.crashed(error))

    def _collect_cache_events(self, core: EngineCore) -> None:
        if events := core.take_cache_events():
            self._hop(lambda: self._events.cache_changed(events))

    def _hop(self, callback: Callable[[], None]) -> None:
        assert self._asyncio is not None
        try:
            self._asyncio.call_soon_threadsafe(callback)
        except RuntimeError:  # the event loop is closed: the process is ending
            log.debug("engine news after the event loop closed")


def _log_fault(future: Future[None]) -> None:
    if not future.cancelled() and (fault := future.exception()) is not None:
        log.debug("a call to the engine failed: %s", fault)
