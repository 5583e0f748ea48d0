"""Asks one server over HTTP. Whatever goes wrong becomes an answer's error, never an exception."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from bench.chaos.answers import Answer, Transcript
from bench.chaos.questions import Ask
from bench.outcome import error_message


class Client:
    """Made by ``connect``."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, model: str, timeout_s: float) -> None:
        self._session = session
        self._url = f"{base_url}/v1/completions"
        self._model = model
        self._timeout_s = timeout_s

    async def ask(self, ask: Ask) -> Answer:
        """Times are of ``time.monotonic``."""
        transcript = Transcript(ask, time.monotonic())
        try:
            async with self._session.post(self._url, json=ask.body(self._model)) as reply:
                if reply.status != 200:
                    return transcript.failed(f"{reply.status}: {_message(await reply.text())}", time.monotonic())
                if ask.stream:
                    async for raw in reply.content:
                        transcript.line(raw.decode().strip(), time.monotonic())
                else:
                    transcript.body(json.loads(await reply.text()), time.monotonic())
        except TimeoutError:
            return transcript.failed(f"no end after {self._timeout_s:g} s", time.monotonic())
        except (aiohttp.ClientError, ValueError) as error:
            return transcript.failed(f"{type(error).__name__}: {error}", time.monotonic())
        return transcript.answer(time.monotonic())


@asynccontextmanager
async def connect(base_url: str, model: str, timeout_s: float) -> AsyncIterator[Client]:
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    # Connections are not reused: one that is closed while idle would look like a lost answer.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        yield Client(session, base_url, model, timeout_s)


def _message(text: str) -> str:
    try:
        body = json.loads(text)
    except ValueError:
        return text[:200]
    return error_message(body, text[:200]) if isinstance(body, dict) else text[:200]
