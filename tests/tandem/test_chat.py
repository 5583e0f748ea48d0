"""`tandem chat` and `tandem complete` against a server that plays a script."""

from __future__ import annotations

import functools
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from proto.errors import NoWorker, TandemError, UserError
from tandem import chat
from tandem.chat import Conversation, Terminal, answer, converse
from tandem.client import Chunk, Client


def event(text: str, **more: object) -> str:
    return "data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}], **more}) + "\n\n"


END = event("", usage={"completion_tokens": 2}, timings={"ttft_ms": 1.5}) + "data: [DONE]\n\n"
GREETING = [event("Grü"), ": a comment\n\n", event("ße"), END]


@dataclass
class Server:
    """Answers each POST with the next script; keeps what it was asked."""

    url: str = ""
    scripts: list[list[str] | web.Response] = field(default_factory=list)
    bodies: list[dict[str, object]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    models: list[str] = field(default_factory=lambda: ["tiny"])

    async def complete(self, request: web.Request) -> web.StreamResponse:
        self.keys.append(request.headers.get("Authorization"))
        self.bodies.append(await request.json())
        script = self.scripts.pop(0)
        if isinstance(script, web.Response):
            return script
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        data = "".join(script).encode()
        for start in range(0, len(data), 7):  # cut inside lines and inside characters
            await reply.write(data[start : start + 7])
        return reply

    async def list_models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name} for name in self.models]})


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", made.complete)
    app.router.add_post("/v1/completions", made.complete)
    app.router.add_get("/v1/models", made.list_models)
    async with TestServer(app) as running:
        made.url = str(running.make_url("/v1"))
        yield made


class Screen:
    """A terminal whose user types ``lines``."""

    def __init__(self, *lines: str) -> None:
        self._lines: Iterator[str] = iter(lines)
        self.shown = ""
        self.notes: list[str] = []
        self.terminal = Terminal(self._ask, self._write, self.notes.append)

    def _ask(self, prompt: str) -> str:
        line = next(self._lines, None)
        if line is None:
            raise EOFError
        return line

    def _write(self, text: str) -> None:
        self.shown += text


async def collect(client: Client, endpoint: str = "chat/completions") -> list[Chunk]:
    return [chunk async for chunk in client.stream(endpoint, {"messages": []})]


async def test_a_stream_is_read_however_it_is_cut(server: Server) -> None:
    server.scripts = [GREETING]
    async with Client(server.url, "key") as client:
        chunks = await collect(client)
    assert "".join(chunk.text for chunk in chunks) == "Grüße"
    assert chunks[-1].usage == {"completion_tokens": 2}
    assert chunks[-1].timings == {"ttft_ms": 1.5}
    assert server.bodies == [{"messages": [], "stream": True}]
    assert server.keys == ["Bearer key"]


async def test_the_url_may_leave_out_v1(server: Server) -> None:
    async with Client(server.url.removesuffix("/v1") + "/") as client:
        assert await client.first_model() == "tiny"


async def test_failures_say_whose_they_are(server: Server) -> None:
    refusal = web.json_response({"error": {"message": "temperature must be finite"}}, status=400)
    failing = web.Response(text="<html>bad gateway</html>", status=502)
    broken = [event("Gr")]
    reported = [event("Gr"), 'data: {"error": {"message": "the worker died"}}\n\n']
    server.scripts = [refusal, failing, broken, reported]
    async with Client(server.url) as client:
        with pytest.raises(UserError, match="400: temperature must be finite"):
            await collect(client)
        with pytest.raises(TandemError, match="502: <html>bad gateway"):
            await collect(client)
        with pytest.raises(NoWorker, match=r"without its last word"):
            await collect(client)
        with pytest.raises(TandemError, match="the worker died"):
            await collect(client)
    server.models = []
    async with Client(server.url) as client:
        with pytest.raises(NoWorker, match="no model yet"):
            await client.first_model()


async def test_nobody_listening_is_one_clear_error() -> None:
    async with Client("http://127.0.0.1:1") as client:
        with pytest.raises(
            NoWorker, match=r"^Cannot reach http://127\.0\.0\.1:1/v1: Connection refused\. Is the server"
        ):
            await client.first_model()


async def test_a_conversation_remembers_what_was_said(server: Server) -> None:
    server.scripts = [GREETING, [event("Again"), END]]
    screen = Screen("Hello", "", "And?")
    conversation = Conversation("tiny", True, "Be brief.", {"max_tokens": 5})
    async with Client(server.url) as client:
        assert await converse(client, conversation, screen.terminal, shows_stats=True) == 0
    assert screen.shown == "Grüße\nAgain\n"
    assert server.bodies[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Grüße"},
        {"role": "user", "content": "And?"},
    ]
    assert server.bodies[1]["max_tokens"] == 5
    assert [note.startswith("2 tokens in ") for note in screen.notes] == [True, True]


def test_ctrl_c_at_the_prompt_ends_it_at_once() -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "tandem", "chat", "--model", "m"]
    # A shell ignores Ctrl-C on behalf of what it runs in the background, these tests perhaps.
    default = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=default) as process:
        shown = b""
        while not shown.endswith(b"> "):
            shown += os.read(ours, 1024)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    os.close(ours)
    os.close(theirs)


def test_lines_are_read_from_a_pipe_too(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.write(writing, "Grüße\r\n\nlast".encode())
    os.close(writing)
    with open(reading) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert [chat.read_line("> ") for _ in range(3)] == ["Grüße", "", "last"]
        with pytest.raises(EOFError):
            chat.read_line("> ")


async def test_a_failed_question_is_taken_back(server: Server) -> None:
    server.scripts = [web.json_response({"error": {"message": "busy"}}, status=429), GREETING]
    screen = Screen("Hello", "Hello?")
    async with Client(server.url) as client:
        await converse(client, Conversation("tiny", True, None, {}), screen.terminal, shows_stats=False)
    assert screen.notes == ["error: 429: busy"]
    assert server.bodies[1]["messages"] == [{"role": "user", "content": "Hello?"}]


async def test_a_completion_stands_alone(server: Server) -> None:
    completion = 'data: {"choices": [{"index": 0, "text": " there"}]}\n\ndata: [DONE]\n\n'
    server.scripts = [[completion], [completion]]
    screen = Screen()
    conversation = Conversation("tiny", False, None, {})
    async with Client(server.url) as client:
        await answer(client, conversation, "Hi", screen.terminal, shows_stats=False)
        await answer(client, conversation, "Ho", screen.terminal, shows_stats=False)
    assert screen.shown == " there\n there\n"
    assert [body["prompt"] for body in server.bodies] == ["Hi", "Ho"]
    assert "messages" not in server.bodies[1]


async def test_the_server_s_list_of_keys_will_do(server: Server) -> None:
    import asyncio

    server.scripts = [GREETING]
    environ = {"TANDEM_API_KEY": "one, two", "OPENAI_API_KEY": "other"}
    assert await asyncio.to_thread(chat.main, "chat", ["--url", server.url, "Hello"], environ) == 0
    assert server.keys == ["Bearer one"]


@pytest.mark.parametrize("argv", [["--quick", "Hello"], ["Hello"], ["Hello", "--temperature=0", "--stats"]])
async def test_the_command_answers_one_question(
    server: Server, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    import asyncio

    server.scripts = [GREETING]
    environ = {"OPENAI_API_KEY": "from-environment"}
    status = await asyncio.to_thread(chat.main, "chat", ["--url", server.url, *argv], environ)
    captured = capsys.readouterr()
    assert (status, captured.out) == (0, "Grüße\n")
    assert server.bodies[0]["model"] == "tiny"
    assert server.keys == ["Bearer from-environment"]
    assert "from-environment" not in captured.out + captured.err
