"""For all tests: hypothesis draws as much as it is told, however slow the machine is at the moment, and without a GPU
Triton's kernels are interpreted (the variable is read when they are defined)."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

if not Path("/dev/nvidia0").exists():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """A module's stacks live on its loop."""
    with asyncio.Runner() as runner:
        yield runner
