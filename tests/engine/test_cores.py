"""How many cores count: a container's quota cuts what the machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.cores import usable_cores

ALL = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", ALL), ("100000 100000", 1), ("50000 100000", 1), ("150000 100000", min(ALL, 2)), ("odd", ALL)],
)
def test_a_quota_cuts_the_cores(tmp_path: Path, quota: str, cores: int) -> None:
    path = tmp_path / "cpu.max"
    path.write_text(f"{quota}\n")
    assert usable_cores(path) == cores


def test_without_a_quota_it_is_the_affinity(tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "none") == ALL


def test_asking_imports_no_torch() -> None:
    code = "import sys, engine.cores, tandem.machine; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
