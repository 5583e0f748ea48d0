"""A decode process is killed in mid-stream: the answer goes on from the blocks that the prefill process has cached."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from proto.ids import WorkerId
from tandem import LLM, SamplingParams
from tests.support.checkpoints import make_checkpoint
from tests.support.stack import Stack, running, stack_settings

PROMPT_TOKENS = 700
NUM_OUTPUT = 250
NUM_BEFORE = 20
"""Tokens that the client has when the process is killed, or a few more."""
PARAMS: dict[str, float | int] = {
    "temperature": 0.9,
    "top_p": 0.95,
    "frequency_penalty": 0.4,
    "repetition_penalty": 1.1,
    "min_tokens": 200,
    "seed": 5,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("resume"), "llama")


@pytest.fixture(scope="module")
def stack(checkpoint: Path) -> Iterator[Stack]:
    with running(stack_settings(checkpoint, prefill=1, decode=2)) as stack:
        yield stack


def prompt() -> list[int]:
    rng = random.Random(3)
    return [rng.randrange(5, 300) for _ in range(PROMPT_TOKENS)]


class Workers:
    """The stack's worker processes by name, as they were at its start."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._urls = {record.worker: f"http://{record.http_address}" for record in stack.ready.workers}

    def computed(self, worker: str) -> float:
        """Prompt tokens that it has computed since its start."""
        return self._stack.metric("tandem_computed_prompt_tokens_total", self._urls[WorkerId(worker)])

    def decoding(self) -> str:
        """The decode worker that has something to do."""
        (busy,) = [
            worker
            for worker, url in self._urls.items()
            if worker.startswith("decode") and self._stack.metric("vllm:num_requests_running", url) > 0
        ]
        return busy

    def kill(self, worker: str) -> None:
        (child,) = [child for child in self._stack.local.supervisor.children if child.spec.name == worker]
        child.signal(signal.SIGKILL)


async def test_only_what_nobody_has_is_computed_again(stack: Stack, checkpoint: Path) -> None:
    workers = Workers(stack)
    tokens: list[int] = []
    killed, before = "", 0.0
    body = {"model": "tiny", "prompt": prompt(), "max_tokens": NUM_OUTPUT, "stream": True, "return_token_ids": True}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(120)) as http,
        http.post(stack.base_url + "/completions", json=body | PARAMS) as reply,
    ):
        assert reply.status == 200, await reply.text()
        async for line in reply.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            tokens += [token for choice in chunk["choices"] for token in choice.get("token_ids") or ()]
            if len(tokens) >= NUM_BEFORE and not killed:
                killed = await asyncio.to_thread(workers.decoding)
                before = await asyncio.to_thread(workers.computed, "prefill-0")
                workers.kill(killed)
    (survivor,) = {"decode-0", "decode-1"} - {killed}
    assert tokens == alone(checkpoint), "the client sees one answer"
    assert before >= PROMPT_TOKENS, "a canary's few tokens are counted, too"
    again = await asyncio.to_thread(workers.computed, "prefill-0") - before
    assert NUM_BEFORE <= again < PROMPT_TOKENS / 2, "the prompt's last block, and what was generated"
    assert await asyncio.to_thread(workers.computed, survivor) == 0, "everything came to it as blocks"
    assert stack.metric("tandem_recoveries_total") == 1


def alone(checkpoint: Path) -> list[int]:
    with LLM(str(checkpoint), dtype="float32", max_model_len=1024, threads=1, num_gpu_blocks_override=600) as llm:
        params = SamplingParams(max_tokens=NUM_OUTPUT, **PARAMS)  # type: ignore[arg-type]
        (output,) = llm.generate([{"prompt_token_ids": prompt()}], params)
        return list(output.outputs[0].token_ids)
