"""Workers are told to stop in the middle of answers longer than their drain timeout: the answers go on elsewhere."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from dataclasses import replace

import aiohttp
import pytest

from tests.support.checkpoints import make_checkpoint
from tests.support.stack import Stack, running, stack_settings

NUM_TOKENS = 700


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("hand-over"), "qwen2")
    settings = stack_settings(checkpoint, prefill=2, decode=2)
    with running(replace(settings, worker=replace(settings.worker, drain_timeout=0.1))) as stack:
        yield stack


async def _tokens(stack: Stack, http: aiohttp.ClientSession, seed: int, has_begun: asyncio.Event) -> list[int]:
    body = {
        "model": "tiny",
        "prompt": f"{seed}: " + "word " * 60,
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "temperature": 0.9,
        "seed": seed,
        "stream": True,
        "return_token_ids": True,
    }
    tokens: list[int] = []
    async with http.post(stack.base_url + "/completions", json=body) as reply:
        assert reply.status == 200, await reply.text()
        async for line in reply.content:
            data = line.decode().strip().removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            chunk = json.loads(data)
            assert "error" not in chunk, chunk
            tokens += [token for choice in chunk["choices"] for token in choice.get("token_ids") or ()]
            if len(tokens) > 5:
                has_begun.set()
    return tokens


async def test_what_outlasts_the_drain_timeout_goes_on_elsewhere(stack: Stack) -> None:
    decodes = [child for child in stack.local.supervisor.children if child.spec.name.startswith("decode")]
    assert len(decodes) == 2
    seeds = range(4)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(120)) as http:
        undisturbed = [await _tokens(stack, http, seed, asyncio.Event()) for seed in seeds]
        assert all(len(tokens) == NUM_TOKENS for tokens in undisturbed)
        begun = [asyncio.Event() for _ in seeds]
        asked = [asyncio.create_task(_tokens(stack, http, seed, begun[seed])) for seed in seeds]
        await asyncio.gather(*(each.wait() for each in begun))
        decodes[0].signal(signal.SIGTERM)
        assert await asyncio.gather(*asked) == undisturbed
    name = decodes[0].spec.name
    assert any(line.startswith(name) and "the rest is handed over" in line for line in stack.lines), stack.lines
    async with asyncio.timeout(30):
        while not any(line.startswith(name) and "died (exit status" in line for line in stack.lines):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert any(line.startswith(name) and "died (exit status 0)" in line for line in stack.lines), stack.lines
    assert await asyncio.to_thread(stack.metric, "tandem_inflight_requests") == 0
    assert not await asyncio.to_thread(stack.open_handoffs)
