"""Sends requests to one server over HTTP and times what comes back. Knows endpoints and bodies; knows no statistics."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import aiohttp
from multidict import CIMultiDict

from bench.outcome import Outcome, Transcript, error_message
from bench.settings import Backend, Sampling, Target
from bench.workload import Request
from proto.errors import NoWorker, SettingsError, UserError
from router.values import Json, JsonObject

_JSON = {"Content-Type": "application/json"}
_PROBE_TIMEOUT = aiohttp.ClientTimeout(total=60)
# Shorter than servers keep idle connections, so that a request is never sent into one that is just being closed.
_KEEPALIVE_S = 2.0
_READY_PAUSE_S = 0.5


class Server:
    """One server and the model to ask it for. Made by ``connect``."""

    def __init__(self, target: Target, session: aiohttp.ClientSession) -> None:
        self.target = target
        self._session = session

    async def find_model(self) -> str:
        """The model that was asked for, else the first that the server lists. Raises NoWorker, UserError."""
        return self.target.model if self.target.model is not None else await self._first_model()

    async def ready(self, timeout_s: float) -> None:
        """Returns once the server lists a model. Raises NoWorker after ``timeout_s``, UserError where it refuses."""
        last_chance = time.monotonic() + timeout_s - _READY_PAUSE_S
        while True:
            try:
                await self._first_model()
                return
            except NoWorker:
                if time.monotonic() > last_chance:
                    raise
            await asyncio.sleep(_READY_PAUSE_S)

    async def _first_model(self) -> str:
        url = f"{self.target.base_url}/v1/models"
        try:
            async with self._session.get(url, timeout=_PROBE_TIMEOUT) as reply:
                body = _parsed(await reply.text())
        except (aiohttp.ClientError, TimeoutError) as error:
            raise NoWorker(f"Cannot reach {url}: {_reason(error)}") from error
        if reply.status >= 400:
            kind = UserError if reply.status < 500 else NoWorker
            raise kind(f"{url}: {reply.status}: {error_message(body, str(reply.reason))}")
        listed = body.get("data")
        first = listed[0] if isinstance(listed, list) and listed else None
        if not isinstance(first, dict) or not isinstance(name := first.get("id"), str):
            raise NoWorker(f"{url} lists no model; give --model.")
        return name

    async def tokenize(self, model: str, text: str) -> list[int] | None:
        """The text's token ids, or None where the server does not tell."""
        url = f"{self.target.base_url}/tokenize"
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        try:
            async with self._session.post(url, json=body, timeout=_PROBE_TIMEOUT) as reply:
                answer = _parsed(await reply.text()) if reply.status == 200 else {}
        except (aiohttp.ClientError, TimeoutError):
            return None
        tokens = answer.get("tokens")
        return [token for token in tokens if isinstance(token, int)] if isinstance(tokens, list) else None

    async def send(self, body: bytes, request: Request) -> Outcome:
        """One request, timed by ``time.perf_counter``. Whatever goes wrong is a Failure, never an exception."""
        url = f"{self.target.base_url}{self.target.endpoint}"
        transcript = Transcript(time.perf_counter())
        try:
            async with self._session.post(url, data=body, headers=_JSON) as reply:
                if reply.status != 200:
                    said = error_message(_parsed(await reply.text()), str(reply.reason))
                    return transcript.failed(time.perf_counter(), f"{reply.status}: {said}")
                async for line, at in _timed_lines(reply.content):
                    transcript.line(line, at)
        except TimeoutError:
            return transcript.failed(time.perf_counter(), f"no end after {self.target.timeout_s:g} s")
        except aiohttp.ClientError as error:
            return transcript.failed(time.perf_counter(), _reason(error))
        except ValueError as error:
            return transcript.failed(time.perf_counter(), f"not an event stream: {error}")
        return transcript.outcome(time.perf_counter(), prompt_len=request.prompt_len, wanted_tokens=request.output_len)


@asynccontextmanager
async def connect(target: Target) -> AsyncIterator[Server]:
    """A server with a connection pool of its own, without limit: waiting for a connection would be measured as TTFT."""
    headers = CIMultiDict({"Authorization": f"Bearer {target.api_key}"} if target.api_key else {})
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
    timeout = aiohttp.ClientTimeout(total=target.timeout_s, sock_connect=60)
    headers.update(target.headers)
    async with aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout) as session:
        yield Server(target, session)


def make_body(request: Request, model: str, backend: Backend, sampling: Sampling) -> bytes:
    """The request's JSON, made before any clock runs. Raises SettingsError for token ids as a chat message."""
    body: JsonObject = {"model": model, "temperature": sampling.temperature, "stream": True}
    body["stream_options"] = {"include_usage": True}
    if sampling.ignore_eos:
        body["ignore_eos"] = True
    if backend is Backend.COMPLETIONS:
        body["prompt"] = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
        body["max_tokens"] = request.output_len
    elif isinstance(request.prompt, str):
        body["messages"] = [{"role": "user", "content": request.prompt}]
        body["max_completion_tokens"] = request.output_len
    else:
        raise SettingsError("--backend openai-chat: a prompt of token ids cannot be a message.")
    return json.dumps(body | sampling.extra_body).encode()


async def _timed_lines(stream: aiohttp.StreamReader) -> AsyncIterator[tuple[str, float]]:
    """Lines with the time at which their last bytes were read."""
    rest = b""
    async for part in stream.iter_any():
        now = time.perf_counter()
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line.decode().rstrip("\r"), now


def _parsed(text: str) -> Mapping[str, Json]:
    """A JSON object; where it is none, one whose message is the text."""
    try:
        found: Json = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"error": {"message": text.strip()}}


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
