"""How every long-running process starts, runs and stops.

    start ──▶ run ──────────▶ stop ──▶ exit code
      │        │   SIGTERM,    │
      │        │   SIGINT, or  ├── longer than the drain timeout: given up, 1
      │        │   run ends    ├── a second signal: the process is killed by it, at once
      │        │               └── stuck, in stopping or in closing what is left: killed by SIGALRM
      │        └── run raises: logged, stopped, 1 (SetupError: one line, 2)
      └── SetupError: one line on stderr, 2;  another error: its traceback, 1

Knows signals and exit codes; knows nothing of what it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from proto.errors import SetupError

log = logging.getLogger(__name__)

PARENT_PID = "_TANDEM_PARENT_PID"
"""Environment variable: the process whose death ends this one too. Set for children by ``child_environment``."""
READY_FD = "_TANDEM_READY_FD"
"""Environment variable: a descriptor of this process, on which it writes a line once its service has started."""
EXIT_OK = 0
EXIT_FAILED = 1
EXIT_SETUP = 2
_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_NUM_THREADS = min(32, (os.cpu_count() or 1) + 4)
CLOSE_S = 10.0
"""What a service may take beyond its drain timeout, to close what it has drained."""
_STUCK_S = 5.0
"""How much longer than its time stopping may take, and how long closing what is left."""


class Service(Protocol):
    async def start(self) -> None:
        """Returns once requests can come. Raises SetupError when the deployment is wrong."""

    async def run(self) -> None:
        """Returns or raises only when the service ends by itself; cancelled otherwise."""

    async def stop(self) -> None:
        """Takes nothing new, finishes what there is, frees everything. Also after a ``start`` that did not finish."""


def run_service(service: Service, *, drain_timeout: float, parent_pid: int | None = None) -> int:
    """Runs ``service`` on the main thread until a signal or its own end, and returns the process's exit code.

    ``stop`` may take ``drain_timeout`` seconds. ``parent_pid`` (or the variable ``PARENT_PID``): die with that process.
    """
    if parent_pid is None and (from_environment := os.environ.get(PARENT_PID, "")).isdecimal():
        parent_pid = int(from_environment)
    if parent_pid is not None and not die_with_parent(parent_pid):
        log.error("the process that started this one is gone")
        return EXIT_FAILED
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.get_loop().set_default_executor(_threads())
            return runner.run(_run(service, drain_timeout))
    except SetupError as error:
        print(f"error: {error.message}", file=sys.stderr)  # noqa: T201 - for whoever typed the command
        return EXIT_SETUP
    except Exception:
        log.exception("could not start")
        return EXIT_FAILED
    finally:
        _end_within(0)


def _end_within(seconds: float) -> None:
    """After so long the system ends this process by SIGALRM, even if its event loop is stuck. 0: it does not."""
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _threads() -> ThreadPoolExecutor:
    """The event loop's threads, all of them started. Starting one when memory is short may wait for ever, and the event
    loop with it; or it fails, and what it was started for is done later, by another thread, when nobody expects it."""
    threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="loop")
    all_there = threading.Barrier(_NUM_THREADS)
    for _ in range(_NUM_THREADS):
        threads.submit(all_there.wait)
    return threads


async def _run(service: Service, drain_timeout: float) -> int:
    """The exit code. What ``start`` raises passes through."""
    with _signals() as signalled:
        code = EXIT_OK
        try:
            if await _until(signalled, service.start):
                _tell_ready()
                code = await _run_until(signalled, service)
            else:
                log.info("stopping: asked to, before the start was complete")
        finally:
            stopped = await _stop(service, drain_timeout)
    return code if stopped else EXIT_FAILED


def _tell_ready() -> None:
    told = os.environ.pop(READY_FD, "")
    if told.isdecimal():
        with contextlib.suppress(OSError), open(int(told), "wb", buffering=0) as whoever_waits:
            whoever_waits.write(b"\n")


async def _run_until(signalled: asyncio.Event, service: Service) -> int:
    try:
        ended_by_itself = await _until(signalled, service.run)
    except SetupError as error:
        log.error("stopping: %s", error.message)
        return EXIT_SETUP
    except Exception:
        log.exception("stopping after an error")
        return EXIT_FAILED
    log.info("stopping: the service ended" if ended_by_itself else "stopping: asked to")
    return EXIT_OK


async def _until(signalled: asyncio.Event, work: Callable[[], object]) -> bool:
    """Whether ``work`` ended before the signal came; if not, it is cancelled. Raises what it raised."""
    working = asyncio.ensure_future(work())  # type: ignore[call-overload]
    waiting = asyncio.ensure_future(signalled.wait())
    await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if working.done():
        working.result()
        return True
    working.cancel()
    await asyncio.wait({working})
    return False


async def _stop(service: Service, drain_timeout: float) -> bool:
    _end_within(drain_timeout + _STUCK_S)
    try:
        async with asyncio.timeout(drain_timeout):
            await service.stop()
    except TimeoutError:
        log.error("gave up stopping in order after %g s; still running: %s", drain_timeout, _still_running())
        return False
    except Exception:
        log.exception("could not stop in order")
        return False
    finally:
        _end_within(_STUCK_S)
    return True


def _still_running() -> str:
    """The event loop's other tasks, each by its name and where it waits."""
    current = asyncio.current_task()
    tasks = sorted((task for task in asyncio.all_tasks() if task is not current), key=lambda task: task.get_name())
    return ", ".join(f"{task.get_name()} ({_place(task)})" for task in tasks) or "nothing else"


def _place(task: asyncio.Task[object]) -> str:
    frames = task.get_stack(limit=1)
    return f"{Path(frames[0].f_code.co_filename).name}:{frames[0].f_lineno}" if frames else "ended"


@contextlib.contextmanager
def _signals() -> Iterator[asyncio.Event]:
    """An event set by the first signal. The second one finds the system's default: the process ends there and then,
    even if the event loop is stuck."""
    loop = asyncio.get_running_loop()
    signalled = asyncio.Event()

    def first() -> None:
        restore()
        signalled.set()

    def restore() -> None:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in _SIGNALS:
        loop.add_signal_handler(number, first)
    try:
        yield signalled
    finally:
        restore()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on this platform
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def child_environment() -> dict[str, str]:
    """This process's environment for a child that must not outlive it."""
    return {**os.environ, PARENT_PID: str(os.getpid())}


def die_with_parent(parent_pid: int) -> bool:
    """Asks Linux to kill this process when its parent dies (elsewhere: does nothing). False: it is dead already.

    The parent is the thread that started this process: start children from one that lives as long as the process.
    """
    if not sys.platform.startswith("linux"):
        return True
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        log.warning("cannot tie this process to its parent: %s", os.strerror(ctypes.get_errno()))
    return os.getppid() == parent_pid
