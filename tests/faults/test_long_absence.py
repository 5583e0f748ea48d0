"""Redis is away for a minute, and requests go on all the time. Run by ``make faults``: it takes that minute."""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path

import pytest

from tandem import LLM, SamplingParams
from tests.support.answer import Answer
from tests.support.arena import Arena
from tests.support.checkpoints import make_checkpoint
from tests.support.stack import stack_settings

AWAY_S = 60.0
ANSWERED_S = 10.0
NUM_CLIENTS = 2
PARAMS = {"max_tokens": 40, "ignore_eos": True, "temperature": 0.8, "seed": 2}


@pytest.mark.skipif(os.environ.get("FAULTS") != "all", reason="takes more than a minute: FAULTS=all")
def test_requests_go_on_while_redis_is_away_for_a_minute(runner: asyncio.Runner, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", "llama")
    rng = random.Random(1)
    prompt = [rng.randrange(5, 300) for _ in range(400)]
    with LLM(str(checkpoint), dtype="float32", max_model_len=1024, threads=1, num_gpu_blocks_override=600) as llm:
        (output,) = llm.generate([{"prompt_token_ids": prompt}], SamplingParams(**PARAMS))  # type: ignore[arg-type]
        expected = list(output.outputs[0].token_ids)
    (tmp_path / "logs").mkdir()
    arena = Arena(stack_settings(checkpoint, prefill=2, decode=2), tmp_path / "logs")
    try:
        runner.run(arena.start())
        runner.run(absence(arena, prompt, expected))
    finally:
        runner.run(arena.stop())


async def absence(arena: Arena, prompt: list[int], expected: list[int]) -> None:
    await arena.redis.kill()
    until = time.monotonic() + AWAY_S
    counts = await asyncio.gather(
        *(keep_asking(arena, prompt, expected, client, until) for client in range(NUM_CLIENTS))
    )
    assert min(counts) > 1
    assert (await arena.readiness())["status"] == "ready"
    await arena.redis.start()
    await arena.ready()
    await arena.recorded()
    await arena.settled()


async def keep_asking(arena: Arena, prompt: list[int], expected: list[int], client: int, until: float) -> int:
    """How many answers came. Every second question is the one before, whose prompt is cached."""
    num_answers = 0
    while time.monotonic() < until:
        answer = Answer()
        async with asyncio.timeout(ANSWERED_S):
            await arena.ask(prompt, answer, cache_salt=f"{client} {num_answers // 2}", **PARAMS)
        assert (answer.tokens, answer.error) == (expected, None)
        num_answers += 1
    return num_answers
