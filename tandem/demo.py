"""``make demo``: starts every tier on this machine, asks one question, and shows where its time went.

The question is long enough to be computed by the prefill worker, so that its KV blocks travel to the decode worker; and
its answer, a code word, lies in one of the blocks in the middle.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from proto.lifecycle import Stage
from router.auth import read_keys
from router.values import JsonObject
from service import logs
from service.process import run_service
from tandem.builtin_model import NOTICE, with_some_model
from tandem.chat import DEFAULT_URL
from tandem.cli import read_settings
from tandem.client import Chunk, Client
from tandem.local import LocalStack, Ready, StackSettings, print_line
from tandem.machine import this_machine
from tandem.options import SERVE

CODE_WORD = "Krolina"
QUESTION = """\
Read this text and then tell me the code word.
The quiet sailor forgot the garden near the library. A ladder stood in the valley and the child sold it in the \
morning. Karin opened the cold barrel every summer. Farid followed the small letter in the morning. A map stood in \
the field and the farmer closed it on a rainy day. In the field there was a narrow garden. Leon repaired the heavy \
basket before sunset. A garden stood in the forest and the soldier followed it every summer. Marco watched the \
simple clock long ago. A bell stood in the castle and the farmer covered it without a word. On a rainy day the \
shepherd moved a simple barrel. Without a word the doctor closed a dusty barrel. Zoe bought the simple map every \
summer. Marco moved the simple coat at night. A garden stood in the field and the miller sold it last winter. In the \
village there was a wooden barrel. Kofi followed the warm candle at night. In the island there was a bright lantern. \
A basket stood in the field and the clerk repaired it after lunch. The young doctor sold the blanket near the \
mountain. The narrow teacher covered the ladder near the river. The code word is Krolina. In the morning the \
gardener closed a young letter. A bottle stood in the forest and the child bought it in the morning. The tired \
sailor carried the letter near the library. The bright doctor watched the garden near the library. Long ago the \
shepherd carried a cold bell. The heavy teacher carried the basket near the castle. Hugo painted the broken coat in \
the morning. A map stood in the island and the widow sold it in the morning. A wagon stood in the church and the \
merchant moved it before sunset. In the river there was a quiet mirror. The bold painter lifted the window near the \
island. Clara cleaned the narrow mirror before sunset. A ladder stood in the village and the merchant opened it in \
the morning. Irene bought the young ladder in the morning. Before sunset the teacher found a simple blanket. Carla \
repaired the heavy map after lunch. A lantern stood in the valley and the child sold it for the first time. A ladder \
stood in the mountain and the gardener painted it long ago. The happy baker opened the clock near the forest. The \
narrow shepherd found the blanket near the market. The bold teacher lifted the blanket near the market. In the \
morning the soldier bought a simple map. A rope stood in the mountain and the gardener repaired it at night. In the \
station there was a narrow basket. Oscar carried the warm barrel for the first time. After lunch the traveller \
lifted a dusty bottle. The narrow miller found the bottle near the village. A candle stood in the harbour and the \
clerk bought it on a rainy day. The tired doctor repaired the basket near the kitchen. In the harbour there was a \
warm coat. In the river there was a quiet basket. A basket stood in the castle and the doctor closed it after lunch. \
Without a word the child found a bright wagon. In the forest there was a bright wagon. The small sailor found the \
lantern near the valley. A wagon stood in the river and the shepherd found it in the morning. Hanna lifted the young \
coat last winter.
What is the code word?"""
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
            command = chat_command(ready.url, has_keys=bool(self._keys))
            print(f"Serving on at {ready.url}; Ctrl-C stops it. Try: {command}", flush=True)


def chat_command(url: str, *, has_keys: bool) -> str:
    """What to type, in this folder, to talk to the server at ``url``."""
    here, script = Path.cwd(), Path(sys.executable).with_name("tandem")
    if shutil.which("tandem") == str(script):
        words = ["tandem"]
    elif script.exists():
        words = [str(script.relative_to(here) if here in script.parent.parents else script)]
    else:
        words = [sys.executable, "-m", "tandem"]
    words += ["chat"] if url == DEFAULT_URL else ["chat", "--url", url]
    return ("TANDEM_API_KEY=... " if has_keys else "") + shlex.join(words)


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
    resolved = read_settings(SERVE, "demo", "Starts everything, asks one question, then serves on.", argv, environ)
    if resolved is None:
        return 0
    wanted = resolved.engine()
    if wanted.model.model is None:
        print(NOTICE, file=sys.stderr)
    settings = StackSettings.of(resolved, with_some_model(wanted))
    logs.setup(settings.log)
    return run_service(Demo(settings, once=bool(environ.get(_ONCE))), drain_timeout=settings.stop_timeout_s)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
