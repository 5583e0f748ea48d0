"""What a process that is started to be measured needs to find this code."""

from __future__ import annotations

import os
from pathlib import Path

_ROOT = str(Path(__file__).parents[2])


def environment() -> dict[str, str]:
    path = os.pathsep.join(part for part in (_ROOT, os.environ.get("PYTHONPATH")) if part)
    return {**os.environ, "PYTHONPATH": path}
