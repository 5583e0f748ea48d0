"""Every stage of a request × every fault: the client sees a pause, and nothing else.

Real processes, a real Redis, a proxy in front of each worker. A stage is reached by what can be seen from outside: by
holding up the bytes that would lead out of it, and by the tokens that the client has. Each row asserts that the
client's tokens are those of an engine that nobody disturbs, that no error came, that the ledger closes, every block is
given back, nothing wrong is cached, and that all of it happens within the stated time.

A sample is run by default; FAULTS=all (``make faults``) runs every row and writes ``docs/faults.md``. The sample stays
under two minutes by which rows are in it (``fault_rows.SAMPLE``): none that has to wait for a keepalive or a stage's
deadline, and so few that the start of the two stacks is half of it.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from proto.settings import LogSettings
from tandem import LLM, SamplingParams
from tests.support.arena import Arena
from tests.support.checkpoints import make_checkpoint
from tests.support.fault_play import Question, make_peace, play
from tests.support.fault_rows import Outcome, Row, rows, write_table
from tests.support.fault_stages import MAX_LENGTH, MODEL, PROMPT_TOKENS, fault_settings

NUM_OUTPUT = 120
RUN_ALL = os.environ.get("FAULTS") == "all"
ROWS = rows(only_sample=not RUN_ALL)
PARAMS = {
    "max_tokens": NUM_OUTPUT,
    "ignore_eos": True,
    "temperature": 0.8,
    "top_p": 0.95,
    "frequency_penalty": 0.3,
    "presence_penalty": 0.2,
    "repetition_penalty": 1.05,
    "seed": 11,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("faults"), "llama", **MODEL)


@pytest.fixture(scope="module")
def question(checkpoint: Path) -> Question:
    rng = random.Random(4)
    prompt = [rng.randrange(5, 300) for _ in range(PROMPT_TOKENS)]
    with LLM(str(checkpoint), dtype="float32", max_model_len=MAX_LENGTH, threads=1, num_gpu_blocks_override=600) as llm:
        (output,) = llm.generate([{"prompt_token_ids": prompt}], SamplingParams(**PARAMS))  # type: ignore[arg-type]
        return Question(prompt, PARAMS, list(output.outputs[0].token_ids))


@pytest.fixture(scope="module")
def arena(
    request: pytest.FixtureRequest,
    runner: asyncio.Runner,
    checkpoint: Path,
    question: Question,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Arena]:
    """One for each transport."""
    settings = fault_settings(checkpoint, request.param)
    arena = Arena(replace(settings, log=LogSettings(log_level="debug")), tmp_path_factory.mktemp("logs"))
    try:
        runner.run(arena.start())
        yield arena
    finally:
        runner.run(arena.stop())


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    """Of all rows so far."""
    return []


@pytest.mark.parametrize(
    ("row", "arena"), [(row, row.transport) for row in ROWS], indirect=["arena"], ids=map(str, ROWS), scope="module"
)
def test_the_client_sees_a_pause_and_nothing_else(
    row: Row, runner: asyncio.Runner, arena: Arena, question: Question, outcomes: list[Outcome]
) -> None:
    outcome = Outcome(row)
    outcomes.append(outcome)
    try:
        runner.run(play(row, arena, question, outcome))
        outcome.holds = True
    except BaseException as error:
        outcome.what = (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:160]
        raise
    finally:
        if RUN_ALL:
            write_table(outcomes)
        runner.run(make_peace(arena))
