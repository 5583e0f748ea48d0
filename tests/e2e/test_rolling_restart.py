"""Every worker is restarted by SIGTERM and under load, a pair at a time, and no client notices."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

from tandem.supervisor import Child
from tests.support.checkpoints import make_checkpoint
from tests.support.stack import Stack, running, stack_settings

NUM_CLIENTS = 2
NUM_TOKENS = 60


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("rolling"), "qwen2")
    with running(stack_settings(checkpoint, prefill=2, decode=2)) as stack:
        yield stack


class Clients:
    """They ask the same questions again and again, and compare every answer with the first."""

    def __init__(self, stack: Stack, http: aiohttp.ClientSession) -> None:
        self.num_answers = 0
        self._url = stack.base_url + "/completions"
        self._http = http
        self._known: dict[int, list[int]] = {}
        self._is_over = False

    async def ask(self, number: int) -> list[int]:
        """The tokens of one streamed answer. Fails where it ends in an error or early."""
        body = {
            "model": "tiny",
            "prompt": f"{number}: " + "word " * (30 * number + 5),
            "max_tokens": NUM_TOKENS,
            "ignore_eos": True,
            "temperature": 0.8 if number % 2 else 0.0,
            "seed": number,
            "stream": True,
            "return_token_ids": True,
        }
        async with self._http.post(self._url, json=body) as reply:
            text = await reply.text()
        assert reply.status == 200, text
        lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
        assert lines.pop() == "[DONE]", text
        chunks = [json.loads(line) for line in lines]
        assert not any("error" in chunk for chunk in chunks), text
        return [token for chunk in chunks for choice in chunk["choices"] for token in choice.get("token_ids") or ()]

    async def keep_asking(self, number: int) -> None:
        while not self._is_over:
            answer = await self.ask(number)
            assert len(answer) == NUM_TOKENS
            assert self._known.setdefault(number, answer) == answer
            self.num_answers += 1

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as tasks:
            for number in range(NUM_CLIENTS):
                tasks.create_task(self.keep_asking(number))
            try:
                yield
            finally:
                self._is_over = True


async def eventually(is_so: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_a_rolling_restart_loses_nothing(stack: Stack) -> None:
    workers = [child for child in stack.local.supervisor.children if child.spec.name != "router"]
    assert len(workers) == 4
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(120)) as http:

        async def all_there() -> bool:
            async with http.get(f"{stack.root_url}/ready") as reply:
                details = (await reply.json())["details"]
            return (details["prefill_workers"], details["decode_workers"]) == (2, 2)

        async def restart(child: Child) -> None:
            before, asked = child.pid, clients.num_answers
            child.signal(signal.SIGTERM)

            async def is_another() -> bool:
                return child.pid not in (None, before) and clients.num_answers > asked

            await eventually(is_another)
            await eventually(all_there)

        clients = Clients(stack, http)
        async with clients.at_work():
            for prefill, decode in zip(workers[:2], workers[2:], strict=True):
                await asyncio.gather(restart(prefill), restart(decode))
    assert clients.num_answers > 2 * NUM_CLIENTS
    assert sum("died (exit status 0)" in line for line in stack.lines) == len(workers)
    await asyncio.to_thread(_nothing_is_open, stack)


def _nothing_is_open(stack: Stack) -> None:
    assert not stack.open_handoffs()
    assert stack.metric("tandem_inflight_requests") == 0
