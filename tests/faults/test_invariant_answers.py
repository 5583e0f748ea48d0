"""In bfloat16, with --batch-invariant: the answer is bit for bit the one it would have been, up to its stop string."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from proto.lifecycle import Stage
from tandem import LLM, SamplingParams
from tests.support.arena import Arena
from tests.support.checkpoints import make_checkpoint, make_tokenizer
from tests.support.fault_play import Question, make_peace, play
from tests.support.fault_rows import Outcome, Row
from tests.support.fault_stages import GRPC, MAX_LENGTH, MODEL, PROMPT_TOKENS, fault_settings

PROMPT_SEED = 3
"""Without the flag, the answer to this prompt depends on the chunks it is computed in, from the twelfth token on."""
NUM_OUTPUT = 120
STOP_FROM = 60
"""The stop string is what the answer says there or a little later: long after the fault."""
STOP_TOKENS = 3
PARAMS = {
    "max_tokens": NUM_OUTPUT,
    "ignore_eos": True,
    "temperature": 0.9,
    "frequency_penalty": 0.4,
    "repetition_penalty": 1.1,
    "seed": 7,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("invariant"), "llama", dtype="bfloat16", **MODEL)


@pytest.fixture(scope="module")
def question(checkpoint: Path) -> Question:
    rng = random.Random(PROMPT_SEED)
    prompt = [rng.randrange(5, 300) for _ in range(PROMPT_TOKENS)]
    options = {"dtype": "bfloat16", "batch_invariant": True, "max_model_len": MAX_LENGTH, "threads": 1}
    with LLM(str(checkpoint), num_gpu_blocks_override=600, **options) as llm:

        def answer(**more: object) -> list[int]:
            params = SamplingParams(**PARAMS, **more)  # type: ignore[arg-type]
            (output,) = llm.generate([{"prompt_token_ids": prompt}], params)
            return list(output.outputs[0].token_ids)

        stop = stop_string(answer())
        expected = answer(stop=[stop])
    assert STOP_FROM < len(expected) < NUM_OUTPUT
    return Question(prompt, {**PARAMS, "stop": [stop]}, expected)


def stop_string(tokens: list[int]) -> str:
    """Some tokens' text that is whole characters, and that the answer has only there."""
    decode = make_tokenizer().decode
    for start in range(STOP_FROM, len(tokens) - STOP_TOKENS):
        text = decode(tokens[start : start + STOP_TOKENS])
        if "\N{REPLACEMENT CHARACTER}" not in text and decode(tokens).count(text) == 1:
            return text
    raise AssertionError("no text to stop at")


@pytest.fixture(scope="module")
def arena(
    runner: asyncio.Runner, checkpoint: Path, question: Question, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Arena]:
    settings = fault_settings(checkpoint, GRPC, dtype="bfloat16")
    model = replace(settings.engine.model, batch_invariant=True)
    settings = replace(settings, engine=replace(settings.engine, model=model))
    arena = Arena(settings, tmp_path_factory.mktemp("logs"))
    try:
        runner.run(arena.start())
        yield arena
    finally:
        runner.run(arena.stop())


@pytest.mark.parametrize(
    "row", [Row(GRPC, Stage.PREFILLING, "P killed"), Row(GRPC, Stage.DECODING, "D killed")], ids=str
)
def test_the_tokens_are_those_of_the_run_without_faults(
    row: Row, runner: asyncio.Runner, arena: Arena, question: Question
) -> None:
    outcome = Outcome(row)
    try:
        runner.run(play(row, arena, question, outcome))
    finally:
        runner.run(make_peace(arena))
    assert outcome.what != "goes on", "somebody else had to go on with it"
