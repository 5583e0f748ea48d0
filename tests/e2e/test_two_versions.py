"""A rolling update: some workers speak the next wire version, with fields that the others have never heard of."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import openai
import pytest

from tandem import LLM, SamplingParams, local
from tandem.supervisor import ChildSpec
from tests.support.checkpoints import make_checkpoint
from tests.support.stack import Stack, running, stack_settings

NEWER = """
import sys
import proto.layout
proto.layout.WIRE_VERSION += 1
from proto.wire import card, control, envelope, handoff
NEWS = bytes([0xfa, 0x7f, 3]) + b"abc"

def telling(seal):
    def tell(message, *limit):
        message.MergeFromString(NEWS)
        return seal(message, *limit)
    return tell

for codec in (card, control, handoff):
    codec.seal = telling(codec.seal)
envelope.UnknownFieldSet = lambda message: ()
from tandem.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""``python -m tandem``, as the next release might be: it says something new, and knows what it means."""
UPDATED = ("prefill-1", "decode-0")


def updated(spec: ChildSpec) -> ChildSpec:
    python, _, _, *command = spec.argv
    return replace(spec, argv=(python, "-c", NEWER, *command)) if spec.name in UPDATED else spec


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("versions"), "llama")


@pytest.fixture(scope="module")
def stack(checkpoint: Path) -> Iterator[Stack]:
    original = local.child_groups
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            local,
            "child_groups",
            lambda *about, **more: [[updated(spec) for spec in group] for group in original(*about, **more)],
        )
        with running(stack_settings(checkpoint, prefill=2, decode=1)) as stack:
            yield stack


def prompts() -> list[list[int]]:
    rng = random.Random(11)
    return [[rng.randrange(5, 300) for _ in range(rng.randint(40, 300))] for _ in range(12)]


async def ask(client: openai.AsyncOpenAI, prompt: list[int]) -> tuple[list[int], str, str]:
    """The tokens, and who made them."""
    reply = await client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True, "include_timings": True},  # type: ignore[typeddict-unknown-key]
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    tokens: list[int] = []
    makers = ("", "")
    async for chunk in reply:
        tokens += [token for choice in chunk.choices for token in choice.token_ids]
        if timings := getattr(chunk, "timings", None):
            makers = (timings["prefill_workers"][0], timings["decode_workers"][0])
    return tokens, *makers


def test_old_and_new_workers_serve_together(stack: Stack, checkpoint: Path) -> None:
    async def ask_all() -> list[tuple[list[int], str, str]]:
        async with openai.AsyncOpenAI(base_url=stack.base_url, api_key="none") as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts()))

    served = asyncio.run(ask_all())
    llm = LLM(model=str(checkpoint), dtype="float32", max_model_len=1024, threads=1, num_gpu_blocks_override=600)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts()],
        SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True),
    )
    assert [tokens for tokens, _, _ in served] == [list(output.outputs[0].token_ids) for output in outputs]
    assert {(prefill, decode) for _, prefill, decode in served} == {
        ("prefill-0", "decode-0"),
        ("prefill-1", "decode-0"),
    }
    stack.assert_nothing_leaks()
