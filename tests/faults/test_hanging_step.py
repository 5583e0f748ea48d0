"""A decode worker's engine hangs in a step, in mid-stream, while its process answers: it is left alone meanwhile.

Its health says so, the router gives it nothing new, what it had goes on elsewhere, and it serves again afterwards.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from proto.settings import RouterSettings
from tandem import LLM, SamplingParams
from tandem.supervisor import ChildSpec
from tests.support.checkpoints import make_checkpoint
from tests.support.stack import Stack, running, stack_settings

ROOT = Path(__file__).parents[2]
NUM_BEFORE = 20
"""Tokens that the client has when the engine hangs, or a few more."""
STALL_S = 1.0
SILENCE_S = 10.0
"""After which the router gives up what the silent worker has: by then it has long been found unready."""
PARAMS = {"max_tokens": 250, "ignore_eos": True, "temperature": 0.9, "frequency_penalty": 0.4, "seed": 5}


@pytest.fixture
def prompt() -> list[int]:
    rng = random.Random(3)
    return [rng.randrange(5, 300) for _ in range(200)]


async def test_it_is_unready_and_left_alone_and_its_request_goes_on_elsewhere(
    prompt: list[int], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", "llama")
    with LLM(str(checkpoint), dtype="float32", max_model_len=1024, threads=1, num_gpu_blocks_override=600) as llm:
        (output,) = llm.generate([{"prompt_token_ids": prompt}], SamplingParams(**PARAMS))  # type: ignore[arg-type]
        expected = list(output.outputs[0].token_ids)

    def wire(spec: ChildSpec) -> ChildSpec:
        if not spec.name.startswith("decode"):
            return spec
        argv = (sys.executable, "-m", "tests.support.hanging_engine", str(tmp_path / spec.name), "decode")
        return replace(spec, argv=argv, environ={**spec.environ, "PYTHONPATH": str(ROOT)})

    router = RouterSettings(disagg_threshold=0, health_interval=0.2, silence_timeout=SILENCE_S, canary_interval=0)
    settings = stack_settings(checkpoint, decode=2, router=router)
    settings = replace(settings, worker=replace(settings.worker, stall_timeout=STALL_S))
    with running(settings, wire=wire) as stack:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(120)) as http:
            await Scene(stack, http, tmp_path).play(prompt, expected)
        await asyncio.to_thread(stack.assert_nothing_leaks)


class Scene:
    """``files``: a file there hangs the decode worker of its name."""

    def __init__(self, stack: Stack, http: aiohttp.ClientSession, files: Path) -> None:
        self._stack = stack
        self._http = http
        self._files = files
        self._urls = {str(record.worker): f"http://{record.http_address}" for record in stack.ready.workers}

    async def play(self, prompt: list[int], expected: list[int]) -> None:
        tokens: list[int] = []
        stream = self.ask(prompt)
        while len(tokens) < NUM_BEFORE:
            tokens += await anext(stream)
        victim = await self.decoding()
        file = self._files / victim
        file.touch()
        began = time.monotonic()
        await self.eventually(lambda: self.is_unready(victim))
        await self.eventually(lambda: self.is_left_alone(victim))
        assert time.monotonic() - began < SILENCE_S, "it was not its health that told"
        others = [token async for some in self.ask(prompt) for token in some]
        assert others == expected, "somebody else answers"
        tokens += [token async for some in stream for token in some]
        assert tokens == expected, "the client sees one answer"
        assert await self.recoveries() == 1
        assert await self.is_unready(victim), "all of this went on without it"
        file.unlink()
        await self.eventually(lambda: self.is_well(victim))

    async def ask(self, prompt: list[int]) -> AsyncIterator[list[int]]:
        body = {"model": "tiny", "prompt": prompt, "stream": True, "return_token_ids": True, **PARAMS}
        async with self._http.post(self._stack.base_url + "/completions", json=body) as reply:
            assert reply.status == 200, await reply.text()
            async for line in reply.content:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    assert "error" not in chunk, chunk
                    yield [token for choice in chunk["choices"] for token in choice.get("token_ids") or ()]

    async def decoding(self) -> str:
        """The decode worker that has something to do."""
        names = [name for name in self._urls if name.startswith("decode")]
        running = [
            await asyncio.to_thread(self._stack.metric, "vllm:num_requests_running", self._urls[name]) for name in names
        ]
        (busy,) = [name for name, num_running in zip(names, running, strict=True) if num_running]
        return busy

    async def is_unready(self, worker: str) -> bool:
        async with self._http.get(f"{self._urls[worker]}/ready") as reply:
            return reply.status == 503 and "finished no step" in (await reply.json())["detail"]

    async def is_left_alone(self, worker: str) -> bool:
        """The router serves, without it."""
        async with self._http.get(f"{self._stack.root_url}/ready") as reply:
            body = await reply.json()
        is_told = any(worker in reason and "finished no step" in reason for reason in body["reasons"])
        return reply.status == 200 and is_told and body["details"]["decode_workers"] == 1

    async def is_well(self, worker: str) -> bool:
        async with self._http.get(f"{self._stack.root_url}/ready") as reply:
            is_back = (await reply.json())["details"]["decode_workers"] == 2
        return is_back and not await self.is_unready(worker)

    async def recoveries(self) -> float:
        return await asyncio.to_thread(self._stack.metric, "tandem_recoveries_total")

    async def eventually(self, is_so: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(60):
            while not await is_so():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
