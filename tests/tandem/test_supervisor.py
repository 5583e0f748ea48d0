"""Children die, hang, talk and refuse to start: what the supervisor makes of each."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from service.process import EXIT_SETUP, READY_FD
from tandem.supervisor import (
    Child,
    ChildFailed,
    ChildSpec,
    Supervisor,
    deaths_in_a_row,
    describe_exit,
    restart_delay_s,
)

TALK_AND_WAIT = "import signal; print('up', flush=True); signal.pause()"
STUBBORN = (
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)\nwhile 1: signal.pause()"
)


READY = f"import os, sys; os.write(int(os.environ['{READY_FD}']), b'ready'); print('up', flush=True); "


class Lines:
    """Everything that was said, and a way to wait for more."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []
        self._changed = asyncio.Event()

    def __call__(self, name: str, line: str) -> None:
        self.said.append((name, line))
        self._changed.set()

    async def until(self, is_enough: Callable[[list[tuple[str, str]]], bool]) -> None:
        async with asyncio.timeout(30):
            while not is_enough(self.said):
                self._changed.clear()
                await self._changed.wait()

    async def until_said(self, name: str, line: str, times: int = 1) -> None:
        await self.until(lambda said: said.count((name, line)) >= times)


def spec(name: str, code: str, stop_timeout_s: float = 20.0, **environ: str) -> ChildSpec:
    return ChildSpec(
        name=name,
        argv=(sys.executable, "-I", "-S", "-c", code),
        environ={"PATH": os.environ["PATH"], **environ},
        stop_timeout_s=stop_timeout_s,
    )


def at_once(num_deaths: int) -> float:
    return 0.0


async def test_lines_come_with_their_childs_name_and_only_the_given_environment() -> None:
    lines, stop = Lines(), asyncio.Event()
    code = "import os, signal; print(sorted(os.environ.keys() - {'LC_CTYPE', '%s'}), flush=True); signal.pause()"
    running = asyncio.create_task(Supervisor([[spec("a", code % READY_FD, SECRET="x")]], lines).run(stop))
    await lines.until_said("a", "['PATH', 'SECRET']")
    stop.set()
    await running


async def test_a_killed_child_is_started_again_with_its_reason() -> None:
    lines, stop = Lines(), asyncio.Event()
    supervisor = Supervisor([[spec("a", TALK_AND_WAIT)]], lines, at_once)
    running = asyncio.create_task(supervisor.run(stop))
    await lines.until_said("a", "up")
    first = supervisor.children[0].pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await lines.until_said("a", "up", times=2)
    assert supervisor.children[0].pid != first
    assert ("a", "died (killed by SIGKILL) and is started again; its last lines:") in lines.said
    assert ("a", "    up") in lines.said
    stop.set()
    await running


async def test_however_often_it_is_killed_it_comes_back() -> None:
    lines, stop = Lines(), asyncio.Event()
    supervisor = Supervisor([[spec("a", TALK_AND_WAIT)]], lines, at_once)
    running = asyncio.create_task(supervisor.run(stop))
    for times in range(1, 9):
        await lines.until_said("a", "up", times)
        supervisor.children[0].signal(signal.SIGKILL)
    await lines.until_said("a", "up", 9)
    stop.set()
    await running


async def test_a_child_that_keeps_failing_as_it_starts_ends_the_run() -> None:
    lines = Lines()
    supervisor = Supervisor(
        [[spec("bad", "import sys; print('no luck'); sys.exit(3)")], [spec("good", TALK_AND_WAIT)]], lines, at_once
    )
    with pytest.raises(ChildFailed, match=r"bad failed 5 times as it started \(exit status 3\)"):
        await supervisor.run(asyncio.Event())
    assert lines.said.count(("bad", "no luck")) == 5
    assert supervisor.children[1].pid is None, "the others are ended as well"


@pytest.mark.parametrize("status", [3, EXIT_SETUP])
async def test_a_child_that_was_ready_comes_back_whatever_it_fails_with(status: int) -> None:
    lines, stop = Lines(), asyncio.Event()
    dying = spec("bad", f"{READY}print('error: why'); sys.exit({status})")
    running = asyncio.create_task(Supervisor([[dying], [spec("good", TALK_AND_WAIT)]], lines, at_once).run(stop))
    await lines.until_said("bad", "up", 8)
    assert lines.said.count(("bad", f"died (exit status {status}) and is started again; its last lines:")) >= 7
    assert lines.said.count(("bad", "    error: why")) >= 7
    assert lines.said.count(("good", "up")) == 1
    stop.set()
    await running


async def test_a_child_that_was_ready_once_is_tried_for_ever(tmp_path: Path) -> None:
    """Later it does not even become ready: what it met with may pass."""
    lines, stop = Lines(), asyncio.Event()
    path = str(tmp_path / "mark")
    later = f"import pathlib, sys; it = pathlib.Path({path!r}); it.exists() and sys.exit({EXIT_SETUP}); it.touch()"
    dying = spec("bad", f"{later}; {READY}sys.exit(1)")
    running = asyncio.create_task(Supervisor([[dying]], lines, at_once).run(stop))
    again = f"died (exit status {EXIT_SETUP}) and is started again; its last lines:"
    await lines.until_said("bad", again, 7)
    stop.set()
    await running


async def test_a_child_for_which_the_system_has_no_process_is_tried_again(tmp_path: Path) -> None:
    lines, stop = Lines(), asyncio.Event()
    program = tmp_path / "program"
    program.symlink_to(sys.executable)
    mine = spec("a", f"{READY}os.unlink({str(program)!r})")
    mine = replace(mine, argv=(str(program), *mine.argv[1:]))
    running = asyncio.create_task(Supervisor([[mine]], lines, at_once).run(stop))
    await lines.until(lambda said: sum(line.startswith("    error: ") for _, line in said) == 7)
    program.symlink_to(sys.executable)
    await lines.until_said("a", "up", 2)
    stop.set()
    await running


async def test_a_wrong_deployment_is_not_tried_twice() -> None:
    code = f"import sys; print('the model folder is empty'); sys.exit({EXIT_SETUP})"
    with pytest.raises(ChildFailed, match="a cannot start: the model folder is empty"):
        await Supervisor([[spec("a", code)]], Lines(), at_once).run(asyncio.Event())


async def test_the_reason_is_the_line_that_says_error() -> None:
    code = f"import sys; print('error: no such model'); print('resource_tracker: bye'); sys.exit({EXIT_SETUP})"
    with pytest.raises(ChildFailed, match=r"^a cannot start: no such model$"):
        await Supervisor([[spec("a", code)]], Lines(), at_once).run(asyncio.Event())


async def test_groups_are_stopped_in_order() -> None:
    lines, stop = Lines(), asyncio.Event()
    code = """
import os, signal, sys
def leave(*_):
    os.write(1, b'bye\\n')  # print() could be interrupted inside print()
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
print('up', flush=True)
while 1: signal.pause()
"""
    groups = [[spec("router", code)], [spec("prefill-0", code), spec("prefill-1", code)], [spec("decode-0", code)]]
    running = asyncio.create_task(Supervisor(groups, lines, at_once).run(stop))
    await lines.until(lambda said: sum(line == "up" for _, line in said) == 4)
    stop.set()
    await running
    leaving = [name for name, line in lines.said if line == "bye"]
    assert leaving[0] == "router"
    assert set(leaving[1:3]) == {"prefill-0", "prefill-1"}
    assert leaving[3] == "decode-0"


async def test_a_child_that_does_not_stop_is_killed() -> None:
    lines, stop = Lines(), asyncio.Event()
    running = asyncio.create_task(Supervisor([[spec("a", STUBBORN, stop_timeout_s=0.05)]], lines, at_once).run(stop))
    await lines.until_said("a", "up")
    stop.set()
    await running
    assert lines.said[-1] == ("a", "did not stop within 0.05 s and is killed")


async def test_kill_ends_all_at_once() -> None:
    lines, stop = Lines(), asyncio.Event()
    supervisor = Supervisor([[spec("a", STUBBORN)], [spec("b", STUBBORN)]], lines, at_once)
    running = asyncio.create_task(supervisor.run(stop))
    await lines.until(lambda said: len(said) == 2)
    stop.set()
    supervisor.kill()
    await running
    assert [child.pid for child in supervisor.children] == [None, None]


async def test_stop_during_the_pause_before_a_restart_ends_it() -> None:
    lines, stop = Lines(), asyncio.Event()
    supervisor = Supervisor([[spec("a", "print('gone')")]], lines, lambda num_deaths: 1e6)
    running = asyncio.create_task(supervisor.run(stop))
    await lines.until_said("a", "    gone")
    stop.set()
    await running
    assert lines.said.count(("a", "gone")) == 1


async def test_cancelling_leaves_no_process_behind() -> None:
    lines = Lines()
    child = Child(spec("a", STUBBORN), lines)
    running = asyncio.create_task(child.run())
    await lines.until_said("a", "up")
    pid = child.pid
    assert pid is not None
    running.cancel()
    await asyncio.wait([running])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_very_long_lines_are_cut_not_lost() -> None:
    lines, stop = Lines(), asyncio.Event()
    code = "import signal, sys; sys.stdout.buffer.write(b'x' * 200_000 + b'\\n\\xff end\\n')"
    code += "; sys.stdout.flush(); signal.pause()"
    running = asyncio.create_task(Supervisor([[spec("a", code)]], lines).run(stop))
    await lines.until_said("a", "\ufffd end")
    assert sum(line.count("x") for _, line in lines.said) == 200_000
    stop.set()
    await running


def test_delays_double_up_to_half_a_minute() -> None:
    assert [restart_delay_s(n) for n in (1, 2, 3, 7, 1000)] == [0.5, 1.0, 2.0, 30.0, 30.0]


def test_a_life_of_some_seconds_begins_a_new_row_of_deaths() -> None:
    assert [deaths_in_a_row(before, lived_s) for before, lived_s in ((0, 1.0), (4, 9.0), (4, 11.0))] == [1, 5, 1]


def test_exit_statuses_in_words() -> None:
    assert describe_exit(0) == "exit status 0"
    assert describe_exit(-9) == "killed by SIGKILL"
    assert describe_exit(-99) == "killed by signal 99"
