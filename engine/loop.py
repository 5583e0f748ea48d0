"""The engine's thread: steps while there is work, sleeps until it is called otherwise.

    any thread ── call(fn) ─▶ [queue] ─▶ engine thread:  run the calls in order ─▶ one step ─▶ on_step ─▶ again

Only this thread touches the core, so the core needs no locks; a call waits at most for the step that is running.
Knows threads; knows nothing of what is computed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from engine.core import EngineCore
from engine.output import StepOutput
from proto.errors import LocalProtocolError, Unavailable

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepHeartbeat:
    """When the thread last got on, by ``time.monotonic``. While ``is_working``, silence means that it is stuck."""

    last_step_monotonic: float
    is_working: bool


@dataclass(frozen=True, slots=True)
class _Call(Generic[T]):
    """Something to do on the engine's thread, for somebody who may be waiting for it."""

    function: Callable[[EngineCore], T]
    future: Future[T]

    def run(self, core: EngineCore) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self.function(core)
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)

    def fail(self, cause: BaseException) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(cause)


class EngineLoop:
    """Drives one core on one thread. ``on_step`` and ``on_crash`` run on that thread and must not wait for it.

    What a step (or ``on_step``) raises ends the loop: ``on_crash`` hears it once, and every call that has not run, and
    every later one, fails with it.
    """

    def __init__(
        self,
        core: EngineCore,
        on_step: Callable[[StepOutput], None],
        on_crash: Callable[[BaseException], None],
    ) -> None:
        self._core = core
        self._on_step = on_step
        self._on_crash = on_crash
        self._changed = threading.Condition()
        self._calls: deque[_Call[object]] = deque()
        self._is_stopping = False
        # Why no call will ever run again; None while they do.
        self._end: BaseException | None = None
        self._heartbeat = StepHeartbeat(time.monotonic(), is_working=False)
        # A daemon, because a step that never returns must not keep the process from ending.
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    @property
    def heartbeat(self) -> StepHeartbeat:
        """May be read from any thread."""
        return self._heartbeat

    def start(self) -> None:
        """Starts the thread. Calls made before are its first."""
        self._thread.start()

    def call(self, function: Callable[[EngineCore], T]) -> Future[T]:
        """Runs ``function`` on the engine's thread before the next step, in the order of the calls; from any thread.

        The future has its result or what it raised, which harms nobody else. It fails with Unavailable after stop(),
        and with the cause after a crash. Never wait for it on the engine's own thread.
        """
        call = _Call(function, Future[T]())
        with self._changed:
            if self._end is None and not self._is_stopping:
                self._calls.append(call)  # type: ignore[arg-type]
                self._changed.notify()
                return call.future
        call.fail(self._end or _stopped())
        return call.future

    def stop(self, timeout: float | None = None) -> bool:
        """Ends the loop after the step that is running and the calls made so far, and joins the thread.

        True once it has ended; False if ``timeout`` seconds were not enough. May be called twice, and without start().
        """
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if self._thread is threading.current_thread():
            raise LocalProtocolError("the engine's thread cannot wait for its own end")
        if self._thread.ident is None:
            self._finish(_stopped())
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _main(self) -> None:
        try:
            while self._wait_for_work():
                self._run_calls()
                if self._core.has_work() and not self._is_stopping:
                    self._beat(is_working=True)
                    self._on_step(self._core.step())
        except BaseException as error:
            log.exception("the engine's step failed")
            self._finish(error)
            self._on_crash(error)
        else:
            self._finish(_stopped())

    def _wait_for_work(self) -> bool:
        """Returns at once while there is work, else when there is a call. False: it is time to end."""
        with self._changed:
            while not self._calls and not self._is_stopping and not self._core.has_work():
                self._beat(is_working=False)
                self._changed.wait()
            return len(self._calls) > 0 or not self._is_stopping

    def _run_calls(self) -> None:
        """Runs those that are queued now; what is called meanwhile waits for the next step."""
        with self._changed:
            calls, self._calls = self._calls, deque()
        if calls:
            self._beat(is_working=True)
        for call in calls:
            call.run(self._core)

    def _beat(self, *, is_working: bool) -> None:
        self._heartbeat = StepHeartbeat(time.monotonic(), is_working)

    def _finish(self, cause: BaseException) -> None:
        with self._changed:
            self._end = cause
            calls, self._calls = self._calls, deque()
        self._beat(is_working=False)
        for call in calls:
            call.fail(cause)


def _stopped() -> Unavailable:
    return Unavailable("The engine has stopped.")
