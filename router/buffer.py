"""Tokens on their way from a request's life to its client. Knows their order; knows no workers and sets no bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from proto.errors import TandemError
from proto.request import TokenOut


class TokenBuffer:
    """One writer (``push``, ``end``), one reader (``take``); neither makes the other wait but for news."""

    def __init__(self) -> None:
        self._tokens: list[TokenOut] = []
        self._news = asyncio.Event()
        self._ended = False
        self._error: TandemError | None = None

    def __len__(self) -> int:
        return len(self._tokens)

    def push(self, tokens: Iterable[TokenOut]) -> None:
        """Tokens pushed after the end are nobody's, and dropped."""
        if not self._ended:
            self._tokens.extend(tokens)
            self._news.set()

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

    async def take(self) -> list[TokenOut]:
        """All tokens buffered, at least one. Raises StopAsyncIteration or the error, also when called again."""
        while not self._tokens:
            if self._ended:
                raise StopAsyncIteration if self._error is None else self._error
            self._news.clear()
            await self._news.wait()
        taken, self._tokens = self._tokens, []
        return taken
