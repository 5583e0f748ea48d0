"""The life of a process, seen from outside: exit codes, signals, and children that do not outlive their parent."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator

import pytest

from service.process import PARENT_PID, READY_FD

PROGRAM = """
import asyncio, os, sys
from proto.errors import SetupError
from service.process import run_service

def say(text): print(text, flush=True)

class Service:
    async def start(self):
        say("start")
        {start}
        say("started")
    async def run(self):
        say("run")
        {run}
    async def stop(self):
        say("stop")
        {stop}
        say("stopped")

sys.exit(run_service(Service(), drain_timeout={drain_timeout}))
"""
FOREVER = "await asyncio.Event().wait()"


class Process:
    """A running program, whose output is read line by line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.lines: list[str] = []

    async def until(self, line: str) -> None:
        assert self._process.stdout is not None
        while not self.lines or self.lines[-1] != line:
            read = await self._process.stdout.readline()
            assert read, f"ended after {self.lines}"
            self.lines.append(read.decode().strip())

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def end(self) -> tuple[int, str]:
        """The exit code and what came on stderr."""
        out, err = await self._process.communicate()
        self.lines += out.decode().split("\n")[:-1]
        assert self._process.returncode is not None
        return self._process.returncode, err.decode()


async def launch(start: str = "pass", run: str = FOREVER, stop: str = "pass", drain_timeout: float = 30.0) -> Process:
    program = PROGRAM.format(start=start, run=run, stop=stop, drain_timeout=drain_timeout)
    return Process(
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_in_order(number: signal.Signals) -> None:
    process = await launch()
    await process.until("run")
    process.signal(number)
    assert (await process.end())[0] == 0
    assert process.lines == ["start", "started", "run", "stop", "stopped"]


async def test_a_signal_during_the_start_stops_too() -> None:
    process = await launch(start=FOREVER)
    await process.until("start")
    process.signal(signal.SIGTERM)
    assert (await process.end())[0] == 0
    assert process.lines == ["start", "stop", "stopped"]


async def test_a_second_signal_ends_the_process_even_if_its_loop_is_stuck() -> None:
    process = await launch(stop="import time; time.sleep(600)")
    await process.until("run")
    process.signal(signal.SIGTERM)
    await process.until("stop")
    process.signal(signal.SIGTERM)
    assert (await process.end())[0] == -signal.SIGTERM


async def test_draining_is_limited_in_time() -> None:
    straggler = "self.task = asyncio.create_task(asyncio.sleep(600), name='a straggler'); "
    process = await launch(stop=straggler + FOREVER, drain_timeout=0.05)
    await process.until("run")
    process.signal(signal.SIGTERM)
    code, errors = await process.end()
    assert code == 1
    assert "gave up stopping in order after 0.05 s; still running: a straggler (tasks.py:" in errors


async def test_a_stop_that_blocks_the_event_loop_ends_too() -> None:
    impatient = "import service.process; service.process._STUCK_S = 0.05"
    process = await launch(start=impatient, run="1 / 0", stop="import time; time.sleep(600)", drain_timeout=0.05)
    code, errors = await process.end()
    assert code == -signal.SIGALRM
    assert "ZeroDivisionError" in errors


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not enforce the limit")
async def test_the_loops_threads_do_not_have_to_be_started_when_memory_is_short() -> None:
    run = """
        import resource
        resource.setrlimit(resource.RLIMIT_DATA, (1 << 20, resource.RLIM_INFINITY))
        await asyncio.to_thread(say, "in a thread")
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    """
    process = await launch(run=run)
    assert (await process.end())[0] == 0
    assert "in a thread" in process.lines


async def test_a_wrong_deployment_is_one_clear_line() -> None:
    process = await launch(start='raise SetupError("no such folder: /models/x")')
    assert await process.end() == (2, "error: no such folder: /models/x\n")
    assert process.lines == ["start", "stop", "stopped"]


async def test_our_own_fault_at_start_shows_its_traceback() -> None:
    code, errors = await (await launch(start='raise KeyError("bug")')).end()
    assert code == 1
    assert "Traceback" in errors
    assert "KeyError" in errors


async def test_a_service_that_fails_while_running_is_stopped_in_order() -> None:
    process = await launch(run='raise RuntimeError("engine gone")')
    code, errors = await process.end()
    assert code == 1
    assert "engine gone" in errors
    assert process.lines[-2:] == ["stop", "stopped"]


async def test_a_deployment_that_shows_to_be_wrong_while_running_is_one_line_too() -> None:
    process = await launch(run='raise SetupError("worker 3 cannot start")')
    code, errors = await process.end()
    assert code == 2
    assert "worker 3 cannot start" in errors
    assert "Traceback" not in errors
    assert process.lines[-1] == "stopped"


async def test_a_service_may_end_by_itself() -> None:
    process = await launch(run="return")
    assert (await process.end())[0] == 0
    assert process.lines[-1] == "stopped"


async def test_failing_to_stop_is_a_failure() -> None:
    code, errors = await (await launch(run="return", stop='raise OSError("disk")')).end()
    assert code == 1
    assert "could not stop in order" in errors


PARENT = """
import subprocess, sys
from service.process import child_environment
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=child_environment(), stdout=sys.stdout)
child.wait()
"""


@pytest.fixture
async def pipe() -> AsyncIterator[tuple[asyncio.StreamReader, int]]:
    """A pipe whose reading end sees EOF once every process that holds the writing end is gone."""
    read_end, write_end = os.pipe()
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_end, "rb")
    )
    yield reader, write_end
    transport.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="parent-death signals are Linux's")
async def test_a_child_does_not_outlive_its_parent(pipe: tuple[asyncio.StreamReader, int]) -> None:
    reader, write_end = pipe
    program = PROGRAM.format(start="pass", run=FOREVER, stop=FOREVER, drain_timeout=600)
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", PARENT, program, stdout=write_end)
    os.close(write_end)
    assert await reader.readuntil(b"run\n")
    parent.kill()
    await parent.wait()
    assert await reader.read() == b""  # the child held the other end, and is gone


async def test_a_child_whose_parent_is_gone_already_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PARENT_PID, "1")
    process = await launch()
    assert (await process.end())[0] == 1
    assert process.lines == []


@pytest.mark.parametrize(("start", "told"), [("pass", b"\n"), ("1 / 0", b"")])
async def test_whoever_waits_is_told_when_it_has_started(
    start: str, told: bytes, pipe: tuple[asyncio.StreamReader, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, write_end = pipe
    program = PROGRAM.format(start=start, run=f"assert {READY_FD!r} not in os.environ", stop="pass", drain_timeout=30.0)
    monkeypatch.setenv(READY_FD, str(write_end))
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", program, pass_fds=(write_end,))
    os.close(write_end)
    assert await reader.read() == told
    assert (await child.wait() == 0) is bool(told)


async def test_whoever_waits_may_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(READY_FD, "1000000")
    process = await launch(run="return")
    assert (await process.end())[0] == 0
