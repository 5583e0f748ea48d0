"""A prompt whose numbers are not finite ends with an error; the workers that tried it go on, and so do all others'
answers."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import openai
import pytest

from tests.support.checkpoints import make_checkpoint
from tests.support.greedy import alone, served
from tests.support.stack import running, stack_settings

POISON = 310
NUM_OUTPUT = 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("poison"), "llama", poison=POISON)


async def test_a_poisoned_prompt_fails_alone(checkpoint: Path) -> None:
    """Clients of OpenAI would repeat it by themselves, and are told not to."""
    rng = random.Random(8)
    common = [rng.randrange(5, 300) for _ in range(100)]
    prompts = [[*common, *(rng.randrange(5, 300) for _ in range(length))] for length in (300, 40, 7)]
    expected = alone(checkpoint, prompts, NUM_OUTPUT)
    with running(stack_settings(checkpoint, prefill=2, decode=2)) as stack:
        async with openai.AsyncOpenAI(base_url=stack.base_url, api_key="none") as client:
            sound = [asyncio.create_task(served(client, prompt, NUM_OUTPUT)) for prompt in prompts]
            for poisoned in ([*common, POISON], [*prompts[0], POISON, *common]):
                with pytest.raises(openai.APIStatusError, match="logits that are not finite") as caught:
                    await served(client, poisoned, NUM_OUTPUT)
                assert caught.value.status_code == 500
                assert caught.value.response.headers["x-should-retry"] == "false"
            assert await asyncio.gather(*sound) == expected
        corrupted = sum(stack.metric("vllm:corrupted_requests_total", url) for url in stack.worker_urls())
        assert corrupted == 4, "two workers say so of each"
        assert not any("the engine failed" in line for line in stack.lines)
        stack.assert_nothing_leaks()
