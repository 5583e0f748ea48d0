"""What the tests of faults have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """A module's stacks live on its loop."""
    with asyncio.Runner() as runner:
        yield runner
