"""All tiers as real processes: they come up, hand a prompt over, survive a killed worker, and go down in order."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from router.values import JsonObject
from tandem.builtin_model import FOLDER
from tandem.client import Chunk, Client
from tandem.local import LocalStack, Ready, StackSettings
from tandem.machine import Machine
from tandem.options import SERVE, build_parser, resolve

PROMPT = "A question that is long enough to be computed by the prefill worker. " * 8


class Running:
    """A stack that is up, with everything its children said."""

    def __init__(self, *argv: str) -> None:
        given = build_parser(SERVE, "tandem serve", "").read(
            [
                str(FOLDER),
                "--dtype=float32",
                "--device=cpu",
                "--port=0",
                "--host=127.0.0.1",
                "--num-gpu-blocks-override=512",
                *argv,
            ]
        )
        resolved = resolve(SERVE, given, {})
        self.lines: list[tuple[str, str]] = []
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        settings = StackSettings.of(resolved, resolved.engine())
        worker = replace(settings.worker, drain_timeout=10.0)
        self.stack = LocalStack(
            replace(settings, worker=worker),
            Machine(cores=2),
            say=lambda name, line: self.lines.append((name, line)),
            on_ready=self.ready.set_result,
            delay_s=lambda num_deaths: 0.0,
        )

    async def __aenter__(self) -> Ready:
        await self.stack.start()
        self._running = asyncio.create_task(self.stack.run())
        async with asyncio.timeout(120):
            await asyncio.wait([self._running, self.ready], return_when=asyncio.FIRST_COMPLETED)
        if self._running.done():
            self._running.result()
        return self.ready.result()

    async def __aexit__(self, *about: object) -> None:
        self._running.cancel()
        await asyncio.wait([self._running])
        await self.stack.stop()


async def stream(client: Client, **more: int | str) -> AsyncIterator[Chunk]:
    body: JsonObject = {
        "model": str(await client.first_model()),
        "prompt": PROMPT,
        "max_tokens": 24,
        "ignore_eos": True,
    }
    body |= {"temperature": 0, "stream_options": {"include_usage": True, "include_timings": True}, **more}
    async for chunk in client.stream("completions", body):
        yield chunk


async def ask(client: Client) -> list[Chunk]:
    return [chunk async for chunk in stream(client)]


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


async def test_a_prompt_is_handed_over_and_a_killed_worker_comes_back() -> None:
    running = Running("--decode=2")
    async with running as ready, Client(ready.url) as client:
        assert [record.worker for record in ready.workers] == ["prefill-0", "decode-0", "decode-1"]
        first = await ask(client)
        timings = first[-1].timings
        assert timings is not None
        assert timings["prefill_workers"] == ["prefill-0"]
        assert isinstance(timings["kv_bytes_moved"], int)
        assert timings["kv_bytes_moved"] > 0

        names = timings["decode_workers"]
        assert isinstance(names, list)
        victim = str(names[0])
        decode = next(child for child in running.stack.supervisor.children if child.spec.name == victim)
        survived: list[Chunk] = []
        async with asyncio.timeout(120):
            async for chunk in stream(client, max_tokens=200):
                survived.append(chunk)
                if sum(bool(chunk.text) for chunk in survived) == 3:
                    decode.signal(signal.SIGKILL)
        assert survived[-1].usage is not None
        assert survived[-1].usage["completion_tokens"] == 200
        assert survived[-1].timings is not None
        assert survived[-1].timings["decode_workers"] != [victim], "who has the prompt cached was asked first, and died"
        assert text_of(survived).startswith(text_of(first)), "the same tokens, whoever made them"
        assert text_of(await ask(client)) == text_of(first)
        assert (victim, "died (killed by SIGKILL) and is started again; its last lines:") in running.lines
    assert [child.pid for child in running.stack.supervisor.children] == [None] * 4


async def test_the_command_serves_until_ctrl_c_and_shows_no_secret() -> None:
    """With no prefill worker, too: the decode worker does it all."""
    argv = ["serve", "--prefill=0", "--device=cpu", "--port=0", "--host=127.0.0.1"]
    environ = {**os.environ, "VLLM_API_KEY": "hush", "TANDEM_NUM_GPU_BLOCKS_OVERRIDE": "512"}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tandem", *argv), env=environ, stdout=PIPE, stderr=PIPE, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    logs = asyncio.create_task(process.stderr.read())
    try:
        async with asyncio.timeout(120):
            ready = (await process.stdout.readline()).decode()
            while (line := (await process.stdout.readline()).decode()).startswith("  "):
                assert line.split()[0] == "decode-0"
            assert line == "Ctrl-C stops everything.\n"
            children = children_of(process.pid)
            async with Client(ready.split()[1], "hush") as client:
                chunks = await ask(client)
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
    log = (await logs).decode()
    assert chunks[-1].usage is not None
    assert chunks[-1].usage["completion_tokens"] == 24
    assert chunks[-1].timings is not None
    assert chunks[-1].timings["kv_bytes_moved"] == 0
    assert sum("-m tandem" in command for command in children.values()) == 2
    assert "hush" not in " ".join(children.values()) + log
    for pid in children:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def children_of(pid: int) -> dict[int, str]:
    """The child processes of ``pid``, each with its arguments as any user of the machine can read them."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child): Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ") for child in children}
