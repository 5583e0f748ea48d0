"""How many cores there are to use. Imports no torch: whoever starts workers asks too."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores(quota: Path = _QUOTA) -> int:
    """Cores this process may run on: its affinity, cut by a container's CPU quota (rounded up), at least one."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    try:
        allowed, period = quota.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if allowed == "max" else min(cores, max(1, math.ceil(int(allowed) / int(period))))
