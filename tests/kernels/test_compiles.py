"""Triton's kernels compile for the GPU they are meant for, wherever the tests run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = {90: 227 << 10, 80: 163 << 10}
"""What a program may take: on an H100 or H200, on an A100."""


@pytest.mark.timeout(900)
def test_kernels_compile_and_fit(tmp_path: Path) -> None:
    environ = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.compiling"], env=environ, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {name for name, capability, _ in compiled if capability == 90} == {
        *("attend", "merge", "multiply", "add_norm", "gate", "rotate_and_write", "cut", "pick"),
        *("quantise_inputs", "multiply_scaled", "multiply_coded", "copy", "sum_tiles"),
    }
    assert {name for name, capability, _ in compiled if capability == 80} == {"attend", "merge", "multiply_scaled"}
    assert [each for each in compiled if each[2] > SHARED_MEMORY[each[1]]] == []
