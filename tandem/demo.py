"""``make demo``: starts every tier on this machine, asks one question, and shows where its time went.

The question is long enough to be computed by the prefill worker, so that its KV blocks travel to the decode worker.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence

from proto.lifecycle import Stage
from router.auth import read_keys
from router.values import JsonObject
from service import logs
from service.process import run_service
from tandem.client import Chunk, Client
from tandem.local import LocalStack, Ready, StackSettings, print_line
from tandem.machine import this_machine
from tandem.options import SERVE, build_parser, resolve
from tandem.sample_model import NOTICE, with_some_model

QUESTION = """\
You are one of two workers that serve a language model together. The first one reads the whole question at \
once: every token of it goes through every layer, which keeps the arithmetic units busy, and what each layer \
remembers of each token is written down as keys and values, block after block. The second one writes the \
answer, one token at a time: each new token looks back at all those keys and values, which keeps the memory \
busy, and the arithmetic units wait. Done by one worker, the long reading of one question stalls the writing \
of every other answer. Done by two, each does what it is good at, and the blocks travel from the first to the \
second while the reading still goes on. Tell me, in your own words, what happens to this very question between \
my keyboard and your answer, and who of you two is speaking now."""
_MAX_TOKENS = 120
_ONCE = "TANDEM_DEMO_ONCE"


class Demo:
    """The local stack as a service, with a question asked once it is ready. With ``once`` it ends after the answer."""

    def __init__(self, settings: StackSettings, *, once: bool) -> None:
        self._stack = LocalStack(settings, this_machine(), say=print_line, on_ready=self._became_ready)
        self._keys = read_keys(settings.router)
        self._once = once
        self._ready: Ready | None = None
        self._is_ready = asyncio.Event()

    async def start(self) -> None:
        await self._stack.start()

    async def run(self) -> None:
        serving = asyncio.ensure_future(self._stack.run())
        asking = asyncio.ensure_future(self._ask())
        try:
            await asyncio.wait([serving, asking], return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                asking.result()
            if not (self._once and asking.done()):
                await serving
        finally:
            for task in (serving, asking):
                task.cancel()
            await asyncio.wait([serving, asking])

    async def stop(self) -> None:
        await self._stack.stop()

    def _became_ready(self, ready: Ready) -> None:
        self._ready = ready
        self._is_ready.set()

    async def _ask(self) -> None:
        await self._is_ready.wait()
        ready = self._ready
        assert ready is not None
        print(f"{ready.describe()}\n\n> {QUESTION}\n", flush=True)
        body: JsonObject = {
            "model": ready.model,
            "messages": [{"role": "user", "content": QUESTION}],
            "max_tokens": _MAX_TOKENS,
            "seed": 1,
            "stream_options": {"include_usage": True, "include_timings": True},
        }
        async with Client(ready.url, next(iter(self._keys), None)) as client:
            last = Chunk("")
            async for chunk in client.stream("chat/completions", body):
                print(chunk.text, end="", flush=True)
                last = chunk if chunk.timings is not None else last
        print(f"\n\n{account(last)}\n", flush=True)
        if not self._once:
            print(f"Serving on at {ready.url}; Ctrl-C stops it. Try: tandem chat", flush=True)


def account(chunk: Chunk) -> str:
    """The stages of a request with their times, and the bytes that moved, as a table."""
    timings, usage = chunk.timings or {}, chunk.usage or {}
    stages = timings.get("stages_ms")
    times = stages if isinstance(stages, dict) else {}
    lines = ["stage          milliseconds"]
    for stage in Stage:
        ms = times.get(stage.value)
        if isinstance(ms, int | float):
            lines.append(f"{stage.value:<14} {ms:>12.1f}")
    for name, label in (("ttft_ms", "first token"), ("total_ms", "in all")):
        ms = timings.get(name)
        if isinstance(ms, int | float):
            lines.append(f"{label:<14} {ms:>12.1f}")
    moved = timings.get("kv_bytes_moved")
    lines.append(
        f"{usage.get('prompt_tokens', 0)} prompt tokens, {usage.get('completion_tokens', 0)} generated; "
        f"{moved if isinstance(moved, int) else 0:,} bytes of KV moved from "
        f"{_names(timings.get('prefill_workers'))} to {_names(timings.get('decode_workers'))}"
    )
    return "\n".join(lines)


def _names(workers: object) -> str:
    return ", ".join(str(worker) for worker in workers) if isinstance(workers, list) and workers else "nobody"


def main(argv: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> int:
    """Takes the flags of ``tandem serve``; returns the exit status. Raises SettingsError."""
    given = build_parser(SERVE, "tandem demo", "Starts everything, asks one question, then serves on.").read(argv)
    resolved = resolve(SERVE, given, environ)
    wanted = resolved.engine()
    if wanted.model.model is None:
        print(NOTICE, file=sys.stderr)
    settings = StackSettings.of(resolved, with_some_model(wanted, environ))
    logs.setup(settings.log)
    return run_service(Demo(settings, once=bool(environ.get(_ONCE))), drain_timeout=settings.stop_timeout_s)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
