"""Ties a child process to the one that started it, so that a killed `tandem serve` leaves nothing running."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

PARENT = "TANDEM_PARENT_PID"
"""Set by the parent for its children; not a setting."""

_PR_SET_PDEATHSIG = 1


def lifeline(parent_pid: int) -> dict[str, str]:
    """What a parent adds to a child's environment."""
    return {PARENT: str(parent_pid)}


def hold_on_to_parent(environ: Mapping[str, str] = os.environ) -> None:
    """In the child: SIGTERM arrives when the parent's thread that started us ends (Linux). Exits if it has already.

    Nothing happens in a process that no `tandem serve` started.
    """
    parent = environ.get(PARENT)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        sys.exit(f"the parent process {parent} is gone")
