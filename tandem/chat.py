"""``tandem chat`` and ``tandem complete``: a terminal in front of any OpenAI-compatible server."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from proto.errors import TandemError
from router.values import JsonObject
from tandem.client import Client
from tandem.parser import Parser

DEFAULT_URL = "http://127.0.0.1:8000/v1"
_KEY_NAMES = ("TANDEM_API_KEY", "OPENAI_API_KEY")


@dataclass(frozen=True, slots=True)
class Terminal:
    """Where text goes and comes from. ``ask`` raises EOFError when there is no more."""

    ask: Callable[[str], str]
    write: Callable[[str], object]
    note: Callable[[str], object]


class Conversation:
    """What was said so far, and the request that continues it. ``is_chat``: otherwise each text stands alone."""

    def __init__(
        self, model: str, is_chat: bool, system_prompt: str | None, sampling: Mapping[str, float | int]
    ) -> None:
        self._model = model
        self._is_chat = is_chat
        self._sampling = sampling
        self._messages: list[JsonObject] = []
        if system_prompt is not None:
            self._messages.append({"role": "system", "content": system_prompt})

    @property
    def endpoint(self) -> str:
        return "chat/completions" if self._is_chat else "completions"

    def ask(self, text: str) -> JsonObject:
        """The body of the request; the text is part of the conversation from here on."""
        body: JsonObject = {"model": self._model, **self._sampling, "stream_options": {"include_usage": True}}
        if not self._is_chat:
            return {**body, "prompt": text}
        self._messages.append({"role": "user", "content": text})
        return {**body, "messages": list(self._messages)}

    def answered(self, text: str) -> None:
        if self._is_chat:
            self._messages.append({"role": "assistant", "content": text})

    def unanswered(self) -> None:
        """Takes the last question back, so that it may be asked again."""
        if self._is_chat:
            self._messages.pop()


def main(name: str, argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Runs ``tandem chat`` or ``tandem complete``; returns the exit status. Raises TandemError."""
    given = _parser(name).read(argv)
    prompt = given.quick if given.quick is not None else given.prompt
    terminal = Terminal(
        read_line, lambda text: print(text, end="", flush=True), lambda text: print(text, file=sys.stderr)
    )
    key = given.api_key or next((environ[name] for name in _KEY_NAMES if environ.get(name)), None)
    # The server's variable may hold a list: any of its keys will do.
    key = key and key.split(",")[0].strip()
    return asyncio.run(_run(name == "chat", given, prompt, key, terminal))


def read_line(prompt: str) -> str:
    """A line of standard input, with ``prompt`` before it on a terminal. Raises EOFError."""
    if sys.stdin.isatty():
        return input(prompt)
    # Unbuffered: the lock of a buffered reader, held by a thread that is left behind, would abort the process.
    line = io.FileIO(sys.stdin.fileno(), closefd=False).readline()
    if not line:
        raise EOFError
    return line.decode(errors="replace").rstrip("\r\n")


def _parser(name: str) -> Parser:
    about = "Talks to a running server." if name == "chat" else "Lets a running server continue a text."
    parser = Parser(f"tandem {name}", f"{about} Without a prompt it asks for one after the other; Ctrl-D ends it.")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="answer this, then end")
    parser.add_argument("-q", "--quick", metavar="PROMPT", help="the same")
    parser.add_argument("--url", default=DEFAULT_URL, help=f"the server (default: {DEFAULT_URL})")
    parser.add_argument("--model", help="a served name (default: the server's first)")
    parser.add_argument("--api-key", metavar="KEY", help=f"better given by environment: {' or '.join(_KEY_NAMES)}")
    if name == "chat":
        parser.add_argument("--system-prompt", metavar="TEXT", help="what the model is told first")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer (default: the server's)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0: always the likeliest token")
    parser.add_argument("--stats", action="store_true", help="say how long each answer took")
    return parser


async def _run(
    is_chat: bool, given: argparse.Namespace, prompt: str | None, key: str | None, terminal: Terminal
) -> int:
    sampling = {
        name: getattr(given, name) for name in ("max_tokens", "temperature") if getattr(given, name) is not None
    }
    async with Client(given.url, key) as client:
        model = given.model or await client.first_model()
        system_prompt = given.system_prompt if is_chat else None
        conversation = Conversation(model, is_chat, system_prompt, sampling)
        if prompt is not None:
            await answer(client, conversation, prompt, terminal, shows_stats=given.stats)
            return 0
        return await converse(client, conversation, terminal, shows_stats=given.stats)


async def converse(client: Client, conversation: Conversation, terminal: Terminal, *, shows_stats: bool) -> int:
    """Question after question until Ctrl-D. A failed one is reported and may be asked again."""
    while True:
        try:
            text = await _ask(terminal, "> ")
        except EOFError:
            return 0
        if not text.strip():
            continue
        try:
            await answer(client, conversation, text, terminal, shows_stats=shows_stats)
        except TandemError as error:
            conversation.unanswered()
            terminal.note(f"error: {error.message}")


async def _ask(terminal: Terminal, prompt: str) -> str:
    """A line from the terminal. Raises EOFError at its end.

    Its thread is left behind on Ctrl-C; asyncio would wait for one of its own until somebody presses Enter.
    """
    loop = asyncio.get_running_loop()
    line: asyncio.Future[str] = loop.create_future()

    def tell(text: str | None) -> None:
        if line.done():
            return
        if text is None:
            line.set_exception(EOFError())
        else:
            line.set_result(text)

    def read() -> None:
        try:
            text = terminal.ask(prompt)
        except (EOFError, OSError, UnicodeError):
            text = None
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            loop.call_soon_threadsafe(tell, text)

    threading.Thread(target=read, name="terminal", daemon=True).start()
    return await line


async def answer(
    client: Client, conversation: Conversation, text: str, terminal: Terminal, *, shows_stats: bool
) -> None:
    """Streams one answer to the terminal. Raises TandemError."""
    start = time.perf_counter()
    first_s: float | None = None
    num_tokens = 0
    parts: list[str] = []
    async for chunk in client.stream(conversation.endpoint, conversation.ask(text)):
        if chunk.text and first_s is None:
            first_s = time.perf_counter() - start
        parts.append(chunk.text)
        terminal.write(chunk.text)
        if chunk.usage is not None and isinstance(count := chunk.usage.get("completion_tokens"), int):
            num_tokens = count
    terminal.write("\n")
    conversation.answered("".join(parts))
    if shows_stats:
        seconds = time.perf_counter() - start
        terminal.note(f"{num_tokens} tokens in {seconds:.2f} s, the first after {first_s or seconds:.2f} s")
