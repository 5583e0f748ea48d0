"""A server that answers by script, and outcomes made by hand."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

from bench.outcome import Answer

Event = Mapping[str, object] | str | None
"""An event of a stream; a text is sent as it is, and None cuts the connection."""


@dataclass(frozen=True, slots=True)
class Reply:
    events: Sequence[Event] = ()
    status: int = 200
    body: str = ""


@dataclass
class Scripted:
    """What the server was asked. ``script`` answers a request's body."""

    script: Callable[[Mapping[str, object]], Reply]
    url: str = ""
    bodies: list[dict[str, object]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    tenants: list[str | None] = field(default_factory=list)
    num_not_ready: int = 0
    """So many first questions for its models are answered with 503."""
    tokens: list[int] | None = None
    models: Sequence[str] = ("scripted",)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization"))
        self.tenants.append(request.headers.get("X-Tenant"))
        reply = self.script(body)
        if reply.status != 200:
            return web.Response(status=reply.status, text=reply.body)
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        for event in reply.events:
            if event is None:
                assert request.transport is not None
                request.transport.abort()
                return stream
            text = event if isinstance(event, str) else json.dumps(event)
            await stream.write(f"data: {text}\n\n".encode())
        return stream

    async def list_models(self, request: web.Request) -> web.Response:
        if self.num_not_ready:
            self.num_not_ready -= 1
            return web.Response(status=503, text="loading")
        return web.json_response({"data": [{"id": name} for name in self.models]})

    async def tokenize(self, request: web.Request) -> web.Response:
        if self.tokens is None:
            return web.Response(status=404, text="Not Found")
        return web.json_response({"tokens": self.tokens})


@asynccontextmanager
async def scripted(script: Callable[[Mapping[str, object]], Reply]) -> AsyncIterator[Scripted]:
    """The server on a loopback port, at ``url``."""
    server = Scripted(script)
    app = web.Application()
    app.router.add_post("/v1/completions", server.generate)
    app.router.add_post("/v1/chat/completions", server.generate)
    app.router.add_get("/v1/models", server.list_models)
    app.router.add_post("/tokenize", server.tokenize)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


def completion(text: str, finish: str | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}


def delta(finish: str | None = None, **shown: str) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": shown, "finish_reason": finish}]}


def usage(prompt: int, output: int, cached: int | None = None) -> dict[str, object]:
    counts: dict[str, object] = {"prompt_tokens": prompt, "completion_tokens": output}
    if cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached}
    return {"choices": [], "usage": counts}


def obliging(body: Mapping[str, object]) -> Reply:
    """As many tokens as were asked for, one per event, and usage as Tandem sends it."""
    prompt = body.get("prompt")
    if prompt is None:
        count = body["max_completion_tokens"]
        events: list[Event] = [delta(role="assistant", content=""), *[delta(content="x")] * int(str(count))]
        events.append(delta(finish="length"))
    else:
        count = body["max_tokens"]
        events = [completion("x")] * (int(str(count)) - 1) + [completion("x", "length")]
    length = len(prompt) if isinstance(prompt, list) else 7
    return Reply([*events, usage(length, int(str(count)), cached=2), "[DONE]"])


def answer(
    *pieces: float, sent: float = 0.0, tokens: int | None = None, prompt: int = 10, wanted: int | None = None
) -> Answer:
    """An answer whose pieces came at these times after it was sent; a token each, unless ``tokens`` says else."""
    count = len(pieces) if tokens is None else tokens
    return Answer(sent, pieces[-1], pieces, prompt_tokens=prompt, output_tokens=count, wanted_tokens=wanted)
