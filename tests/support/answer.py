"""A streamed answer as its client sees it, and a client that takes its time to ask. Knows no stack."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field


@dataclass
class Answer:
    """What a client got. ``arrivals``: when each piece with tokens came."""

    tokens: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def has(self, num_tokens: int) -> None:
        while len(self.tokens) < num_tokens and self.finish is None and self.error is None:
            self.changed.clear()
            await self.changed.wait()

    def pause_after(self, moment: float) -> float:
        """Seconds from ``moment`` to the next token, or to the longest silence after it, if that is longer."""
        times = [moment, *(at for at in self.arrivals if at > moment)]
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)


class Gate:
    """Holds a request's body up in its middle until it is opened."""

    def __init__(self) -> None:
        self.is_half_through = asyncio.Event()
        self._is_open = asyncio.Event()

    def open(self) -> None:
        self._is_open.set()

    async def pass_on(self, body: bytes) -> AsyncIterator[bytes]:
        half = len(body) // 2
        yield body[:half]
        self.is_half_through.set()
        await self._is_open.wait()
        yield body[half:]
