"""A small streaming client of OpenAI's HTTP API: what ``tandem chat`` and the demo need of it.

Knows HTTP and server-sent events; prints nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType

import aiohttp

from proto.errors import NoWorker, TandemError, UserError
from router.values import Json, JsonObject


@dataclass(frozen=True, slots=True)
class Chunk:
    """One event of a stream. ``text`` may be empty; ``usage`` and ``timings`` come with the last one, if asked for."""

    text: str
    finish_reason: str | None = None
    usage: Mapping[str, Json] | None = None
    timings: Mapping[str, Json] | None = None


class Client:
    """Requests to one server. ``url`` may end in /v1 or not. An async context manager."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        base = url.rstrip("/")
        self.base = base if base.endswith("/v1") else f"{base}/v1"
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A stream lasts as long as it lasts; only getting no connection is an error of its own.
        self._session = aiohttp.ClientSession(
            headers=headers, timeout=aiohttp.ClientTimeout(total=None, sock_connect=10)
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._session.close()

    async def first_model(self) -> str:
        """The first served name. Raises NoWorker when there is none, and what ``stream`` raises."""
        try:
            async with self._session.get(f"{self.base}/models") as reply:
                await _raise_for(reply)
                listed = await reply.json()
        except aiohttp.ClientError as error:
            raise NoWorker(f"Cannot reach {self.base}: {_reason(error)}") from error
        if not listed["data"]:
            raise NoWorker("The server has no model yet.")
        return str(listed["data"][0]["id"])

    async def stream(self, endpoint: str, body: JsonObject) -> AsyncIterator[Chunk]:
        """Posts ``body`` with ``stream`` set and yields what comes.

        Raises UserError for what the server says is wrong with the request, NoWorker where it cannot be reached or
        the stream breaks, TandemError for any other failure it reports.
        """
        try:
            async with self._session.post(f"{self.base}/{endpoint}", json={**body, "stream": True}) as reply:
                await _raise_for(reply)
                async for line in _lines(reply.content):
                    if not line.startswith("data:"):
                        continue
                    data = line.removeprefix("data:").strip()
                    if data == "[DONE]":
                        return
                    yield _chunk(json.loads(data))
        except aiohttp.ClientError as error:
            raise NoWorker(f"Lost the connection to {self.base}: {error}") from error
        raise NoWorker("The stream ended without its last word, [DONE].")


def _reason(error: aiohttp.ClientError) -> str:
    """Why, in the system's words where it is the system's news."""
    if isinstance(error, aiohttp.ClientConnectorError):
        number = error.os_error.errno  # negative for names that cannot be resolved
        return f"{os.strerror(number) if number and number > 0 else error.strerror}. Is the server running there?"
    return str(error)


async def _lines(stream: aiohttp.StreamReader) -> AsyncIterator[str]:
    rest = b""
    async for part in stream.iter_any():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line.decode()


def _chunk(event: JsonObject) -> Chunk:
    if isinstance(error := event.get("error"), dict):
        raise TandemError(str(error.get("message")))
    choices = event.get("choices")
    usage, timings = event.get("usage"), event.get("timings")
    text, finish = "", None
    if isinstance(choices, list) and choices and isinstance(choice := choices[0], dict):
        delta = choice.get("delta")
        found = delta.get("content") if isinstance(delta, dict) else choice.get("text")
        text = found if isinstance(found, str) else ""
        finish = choice.get("finish_reason")
    return Chunk(
        text,
        finish if isinstance(finish, str) else None,
        usage if isinstance(usage, dict) else None,
        timings if isinstance(timings, dict) else None,
    )


async def _raise_for(reply: aiohttp.ClientResponse) -> None:
    if reply.status < 400:
        return
    text = await reply.text()
    try:
        message = str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = text.strip()[:500] or str(reply.reason)
    kind = UserError if reply.status < 500 else TandemError
    raise kind(f"{reply.status}: {message}")
