"""The built-in model's answers through the whole stack: held-out questions of every skill, right letter for letter."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from random import Random

import openai
import pytest

from tandem.builtin_model import FOLDER
from tests.support.stack import Stack, running, stack_settings
from training.evaluate import LongCodeWord, answer, questions, score

QUESTIONS = questions(20)
MOST_WRONG = 2
"""Of those of one skill: two in twenty is what 95 % right gives now and then."""


@pytest.fixture(scope="module", params=["1P1D", "2P2D"])
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    settings = stack_settings(
        FOLDER, prefill=int(request.param[0]), decode=int(request.param[2]), dtype="auto", max_model_len=2048, chunk=128
    )
    with running(settings) as stack:
        yield stack


@pytest.mark.parametrize("skill", QUESTIONS)
def test_held_out_questions_are_answered_right(stack: Stack, skill: str) -> None:
    async def ask() -> tuple[int, float]:
        async with openai.AsyncOpenAI(base_url=stack.base_url, api_key="none") as client:
            scored = await score(client, skill, QUESTIONS[skill], concurrency=4)
            return len(scored.wrong), scored.prompt_tokens

    num_wrong, prompt_tokens = asyncio.run(ask())
    assert num_wrong <= MOST_WRONG
    if skill == LongCodeWord.name:
        assert prompt_tokens > 1000, "many blocks and several chunks"


def test_a_code_word_is_found_wherever_it_lies(stack: Stack) -> None:
    """In the prompt's first block, its last, or any between: a block that were lost or damaged would show."""
    samples = [LongCodeWord().make(Random(i), held_out=True, depth=i / 15) for i in range(16)]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=stack.base_url, api_key="none") as client:
            return [(await answer(client, "tiny", sample))[0] for sample in samples]

    said = asyncio.run(ask())
    assert sum(sample.accepts(text) for sample, text in zip(samples, said, strict=True)) >= len(samples) - 1
    stack.assert_nothing_leaks()


def test_blocks_travelled(stack: Stack) -> None:
    assert stack.metric("tandem_kv_transfer_bytes_total") > 10_000_000
