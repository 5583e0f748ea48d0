"""A child whose parent is killed ends too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tandem.lifeline import PARENT, hold_on_to_parent, lifeline

CHILD = """
import signal
from tandem.lifeline import hold_on_to_parent
hold_on_to_parent()
print('holding', flush=True)
signal.pause()
"""
PARENT_CODE = """
import os, subprocess, sys, signal
from tandem.lifeline import lifeline
subprocess.Popen([sys.executable, '-c', sys.argv[1]], env={**os.environ, **lifeline(os.getpid())})
signal.pause()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="death signals are Linux's")
def test_a_killed_parent_takes_its_child_along() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT_CODE, CHILD], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "holding\n"
        parent.send_signal(signal.SIGKILL)
        assert parent.stdout.read() == "", "the pipe ends when the last holder of it, the child, is gone"


def test_without_a_parent_nothing_happens() -> None:
    hold_on_to_parent({})
    assert lifeline(7) == {PARENT: "7"}


@pytest.mark.skipif(sys.platform != "linux", reason="death signals are Linux's")
def test_a_parent_that_is_gone_already_is_noticed() -> None:
    code = "from tandem.lifeline import hold_on_to_parent; hold_on_to_parent({'TANDEM_PARENT_PID': '1'})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.returncode == 1
    assert "parent process 1 is gone" in done.stderr
