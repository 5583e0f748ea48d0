"""The served stack says the same tokens as one engine alone, whoever computed and whichever way the blocks went."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tandem import LLM, SamplingParams
from tests.support.checkpoints import make_checkpoint
from tests.support.stack import Stack, running, stack_settings

NUM_OUTPUT = 12
LENGTHS = (1, 15, 16, 17, 100, 700)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tokens"), "llama")


@pytest.fixture(scope="module", params=["1P1D-shm", "1P1D-grpc", "2P2D-shm", "2P2D-grpc"])
def stack(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Stack]:
    shape, transport = request.param.split("-")
    settings = stack_settings(checkpoint, prefill=int(shape[0]), decode=int(shape[2]), transports=(transport,))
    with running(settings) as stack:
        yield stack


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(model=str(checkpoint), dtype="float32", max_model_len=1024, threads=1, num_gpu_blocks_override=600)


def prompts() -> list[list[int]]:
    rng = random.Random(7)
    shared = [rng.randrange(5, 300) for _ in range(64)]
    made = [[rng.randrange(5, 300) for _ in range(length)] for length in LENGTHS]
    return [*made, shared + made[3], shared + made[2]]


def served(stack: Stack, all_params: list[dict[str, object]]) -> list[list[list[int]]]:
    """Per request, per choice: the token ids; all requests at once."""

    async def ask(client: openai.AsyncOpenAI, prompt: list[int], params: dict[str, object]) -> list[list[int]]:
        known = {name: params[name] for name in ("temperature", "top_p", "seed", "n") if name in params}
        extra = {name: value for name, value in params.items() if name not in known}
        reply = await client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=NUM_OUTPUT,
            extra_body={"return_token_ids": True, "ignore_eos": True, **extra},
            **known,  # type: ignore[call-overload]
        )
        return [list(choice.token_ids) for choice in sorted(reply.choices, key=lambda each: each.index)]

    async def ask_all() -> list[list[list[int]]]:
        async with openai.AsyncOpenAI(base_url=stack.base_url, api_key="none") as client:
            return await asyncio.gather(
                *(ask(client, prompt, params) for prompt, params in zip(prompts(), all_params, strict=True))
            )

    return asyncio.run(ask_all())


def alone(llm: LLM, all_params: list[dict[str, object]]) -> list[list[list[int]]]:
    params = [SamplingParams(max_tokens=NUM_OUTPUT, ignore_eos=True, **each) for each in all_params]  # type: ignore[arg-type]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts()], params)
    return [[list(choice.token_ids) for choice in output.outputs] for output in outputs]


def test_greedy(stack: Stack, llm: LLM) -> None:
    params: list[dict[str, object]] = [{"temperature": 0.0} for _ in prompts()]
    assert served(stack, params) == alone(llm, params)
    stack.assert_nothing_leaks()


def test_seeded_with_every_sampling_parameter(stack: Stack, llm: LLM) -> None:
    params: list[dict[str, object]] = [
        {
            "temperature": 0.9,
            "top_p": 0.95,
            "top_k": 50,
            "min_p": 0.01,
            "presence_penalty": 0.3,
            "frequency_penalty": 0.2,
            "repetition_penalty": 1.1,
            "seed": 100 + index,
            "n": 1 + index % 3,
        }
        for index, _ in enumerate(prompts())
    ]
    assert served(stack, params) == alone(llm, params)
    stack.assert_nothing_leaks()


def test_blocks_travelled(stack: Stack) -> None:
    prefill = [f"http://{record.http_address}" for record in stack.ready.workers if record.role.value == "prefill"]
    assert sum(stack.metric("tandem_kv_transfer_bytes_total", url) for url in prefill) > 0
    assert stack.metric("tandem_kv_transfer_bytes_total") > 0
