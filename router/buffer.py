"""Tokens on their way from a request's life to its client. Knows their order and how long they lie; no workers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from proto.errors import TandemError
from proto.request import TokenOut
from router.timers import Alarm, Timers

READ_S = 1.0
"""How long more tokens than the limit may lie: what comes all at once is no sign of a slow reader."""


class TokenBuffer:
    """One writer (``push``, ``end``), one reader (``take``); neither makes the other wait but for news.

    ``too_slow`` is called when more than ``limit`` tokens have lain for READ_S, and none was taken meanwhile.
    """

    def __init__(self, limit: int, timers: Timers, too_slow: Callable[[], None]) -> None:
        self._limit = limit
        self._too_slow = too_slow
        self._patience = Alarm(timers)
        self._tokens: list[TokenOut] = []
        self._news = asyncio.Event()
        self._ended = False
        self._error: TandemError | None = None

    def push(self, tokens: Iterable[TokenOut]) -> None:
        """Tokens pushed after the end are nobody's, and dropped."""
        if self._ended:
            return
        self._tokens.extend(tokens)
        self._news.set()
        if len(self._tokens) > self._limit and not self._patience.is_set:
            self._patience.set(READ_S, self._judge)

    def drop(self, choice: int) -> None:
        """The tokens of ``choice`` that were not taken yet are not wanted."""
        self._tokens = [out for out in self._tokens if out.choice != choice]

    def clear(self) -> None:
        self._tokens.clear()

    def end(self, error: TandemError | None) -> None:
        """Nothing more comes. What is buffered is read first, then ``error`` (None: the end). The first end stays."""
        if not self._ended:
            self._ended = True
            self._error = error
            self._news.set()
            self._patience.cancel()

    async def take(self) -> list[TokenOut]:
        """All tokens buffered, at least one. Raises StopAsyncIteration or the error, also when called again."""
        while not self._tokens:
            if self._ended:
                raise StopAsyncIteration if self._error is None else self._error
            self._news.clear()
            await self._news.wait()
        taken, self._tokens = self._tokens, []
        self._patience.cancel()
        return taken

    def _judge(self) -> None:
        if len(self._tokens) > self._limit:  # a choice that is not wanted any more may have been dropped
            self._too_slow()
