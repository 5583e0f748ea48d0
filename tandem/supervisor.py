"""Keeps child processes running, and ends them in order.

    start ─▶ running ─▶ died ─▶ wait (longer each time) ─▶ start again
                │          └──▶ ChildFailed: it was never ready, and keeps failing or says that trying again is useless
                └─ stop ─▶ SIGTERM ─▶ ended, or SIGKILL when its time is over

A child that was ready once comes back for ever, whatever it dies of. It says that it is ready by ``READY_FD``.

Knows processes, signals and lines of text; knows nothing of what the children do.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import io
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from proto.errors import SetupError
from service.process import EXIT_FAILED, EXIT_SETUP, READY_FD

Say = Callable[[str, str], None]
"""Shows one line (of whom, what)."""

_STEADY_S = 10.0
_MOST_FAILED_STARTS = 5
_LAST_LINES = 8
_LONGEST_LINE = 1 << 16
_ERROR = "error: "
"""How ``service.process`` begins the line that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """One process to keep running. ``environ`` is its whole environment, but for ``READY_FD``; secrets belong there,
    never in ``argv``."""

    name: str
    argv: tuple[str, ...]
    environ: Mapping[str, str]
    stop_timeout_s: float = 30.0


class ChildFailed(SetupError):
    """A child that will not run."""


def restart_delay_s(num_deaths: int) -> float:
    """Half a second after the first death in a row, doubling up to 30 s."""
    return min(30.0, 0.5 * 2.0 ** min(num_deaths - 1, 10))


def deaths_in_a_row(before: int, lived_s: float) -> int:
    """With one more after ``lived_s``: a life of some seconds begins a new row."""
    return before + 1 if lived_s < _STEADY_S else 1


def describe_exit(status: int) -> str:
    """``status`` as asyncio reports it: negative for a signal."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


class Child:
    """One child and its restarts. ``run`` returns after ``stop``; both may be called once."""

    def __init__(self, spec: ChildSpec, say: Say, delay_s: Callable[[int], float] = restart_delay_s) -> None:
        self.spec = spec
        self._say = say
        self._delay_s = delay_s
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._last_lines: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
        self._has_been_ready = False
        self._ended = asyncio.Event()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def run(self) -> None:
        """Keeps the child running until ``stop``. Raises ChildFailed, but not once the child has been ready."""
        num_deaths = num_failed_starts = 0
        clock = asyncio.get_running_loop().time
        try:
            while not self._stopping.is_set():
                started = clock()
                status = await self._run_once()
                if self._stopping.is_set():
                    return
                num_deaths = deaths_in_a_row(num_deaths, clock() - started)
                num_failed_starts = num_failed_starts + 1 if status > 0 else 0
                if not self._has_been_ready:
                    self._give_up_if_hopeless(status, num_failed_starts)
                self._report_death(status)
                await self._pause(self._delay_s(num_deaths))
        finally:
            self._ended.set()

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL if it takes longer than it may. Returns when it has ended."""
        self._stopping.set()
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(self.spec.stop_timeout_s):
                await self._ended.wait()
        except TimeoutError:
            self._say(self.spec.name, f"did not stop within {self.spec.stop_timeout_s:g} s and is killed")
            self.signal(signal.SIGKILL)
            await self._ended.wait()

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def kill(self) -> None:
        """Ends it at once, for good."""
        self._stopping.set()
        self.signal(signal.SIGKILL)

    async def _run_once(self) -> int:
        """Its exit status; that of a failure where the system has no process to give."""
        self._last_lines.clear()
        try:
            told, teller = _pipe()
            with told:
                with teller:
                    self._process = await self._spawn(teller.fileno())
                status = await self._outlive(self._process)
                self._has_been_ready = self._has_been_ready or bool(told.read(1))
        except OSError as error:
            self._last_lines.append(f"{_ERROR}{error}")
            return EXIT_FAILED
        return status

    async def _spawn(self, ready_fd: int) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self.spec.argv,
            env={**self.spec.environ, READY_FD: str(ready_fd)},
            pass_fds=(ready_fd,),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the parent, which stops its children in order
        )

    async def _outlive(self, process: asyncio.subprocess.Process) -> int:
        if self._stopping.is_set():  # stop() came while it was being started, and found nobody to signal
            self.signal(signal.SIGTERM)
        assert process.stdout is not None
        reader = asyncio.create_task(self._forward(process.stdout))
        try:
            status = await process.wait()
            # A grandchild may hold the pipe open: the last lines are worth a moment, not more.
            await asyncio.wait([reader], timeout=1.0)
        finally:
            self.signal(signal.SIGKILL)  # only where this task was cancelled is it still there
            await process.wait()
            self._process = None
            reader.cancel()
        return status

    async def _forward(self, stream: asyncio.StreamReader) -> None:
        rest = b""
        while chunk := await stream.read(_LONGEST_LINE):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) >= _LONGEST_LINE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._take_line(line)
        if rest:
            self._take_line(rest)

    def _take_line(self, raw: bytes) -> None:
        line = raw.decode(errors="replace").rstrip()
        self._last_lines.append(line)
        self._say(self.spec.name, line)

    def _give_up_if_hopeless(self, status: int, num_failed_starts: int) -> None:
        """Of a child that has never been ready. Raises ChildFailed."""
        why = describe_exit(status)
        if status == EXIT_SETUP:  # the deployment is wrong: it would fail again
            said = [line.removeprefix(_ERROR) for line in self._last_lines if line.startswith(_ERROR)]
            raise ChildFailed(f"{self.spec.name} cannot start: {(said or [*self._last_lines] or [why])[-1]}")
        if num_failed_starts >= _MOST_FAILED_STARTS:
            raise ChildFailed(f"{self.spec.name} failed {num_failed_starts} times as it started ({why})")

    def _report_death(self, status: int) -> None:
        self._say(self.spec.name, f"died ({describe_exit(status)}) and is started again; its last lines:")
        for line in list(self._last_lines):
            self._say(self.spec.name, f"    {line}")

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()


def _pipe() -> tuple[io.FileIO, io.FileIO]:
    """Its ends: one to read from without waiting, one to write to."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    return io.FileIO(reader, "rb"), io.FileIO(writer, "wb")


class Supervisor:
    """Children in groups: groups are stopped one after the other, in order; a group's members together."""

    def __init__(
        self,
        groups: Sequence[Sequence[ChildSpec]],
        say: Say,
        delay_s: Callable[[int], float] = restart_delay_s,
    ) -> None:
        self._groups = [[Child(spec, say, delay_s) for spec in group] for group in groups]

    @property
    def children(self) -> list[Child]:
        return [child for group in self._groups for child in group]

    async def run(self, stop: asyncio.Event) -> None:
        """Runs all children until ``stop`` is set, then ends them in order; also when one fails for good.

        Raises ChildFailed, after the others have ended.
        """
        tasks = [asyncio.create_task(child.run(), name=child.spec.name) for child in self.children]
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
            for group in self._groups:
                await asyncio.gather(*(child.stop() for child in group))
            await asyncio.gather(*tasks)
        finally:
            stopping.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def kill(self) -> None:
        """Ends every child at once."""
        for child in self.children:
            child.kill()
