"""Every stage of a request × every fault: the client sees a pause, and nothing else.

Real processes, a real Redis, a proxy in front of each worker. A stage is reached by what can be seen from outside: by
holding up the bytes that would lead out of it, and by the tokens that the client has. Each row asserts that the
client's tokens are those of an engine that nobody disturbs, that no error came, that the ledger closes, every block is
given back, and that all of it happens within the stated time.

A sample is run by default; FAULTS=all (``make faults``) runs every row and writes ``docs/faults.md``.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from proto.control import Role
from tandem import LLM, SamplingParams
from tests.support.arena import Answer, Arena
from tests.support.checkpoints import make_checkpoint
from tests.support.fault_rows import FAULTS, NUM_OUTPUT, PROMPT_TOKENS, STAGES, Outcome, Row, Scene, rows, write_table
from tests.support.stack import stack_settings

MOST_ATTEMPTS = 10
RUN_ALL = os.environ.get("FAULTS") == "all"
PARAMS = {"temperature": 0.8, "top_p": 0.95, "frequency_penalty": 0.3, "seed": 11}
MODEL = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 2048}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("faults"), "llama", **MODEL)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    rng = random.Random(4)
    return [rng.randrange(5, 300) for _ in range(PROMPT_TOKENS)]


@pytest.fixture(scope="module")
def expected(checkpoint: Path, prompt: list[int]) -> list[int]:
    """The run without faults: one engine, which nobody disturbs."""
    with LLM(str(checkpoint), dtype="float32", max_model_len=2048, threads=1, num_gpu_blocks_override=600) as llm:
        params = SamplingParams(max_tokens=NUM_OUTPUT, ignore_eos=True, **PARAMS)  # type: ignore[arg-type]
        (output,) = llm.generate([{"prompt_token_ids": prompt}], params)
        return list(output.outputs[0].token_ids)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def arena(runner: asyncio.Runner, checkpoint: Path, expected: list[int]) -> Iterator[Arena]:
    settings = stack_settings(
        checkpoint, prefill=2, decode=2, transports=("grpc",), max_model_len=2048, chunk=16, num_blocks=600
    )
    arena = Arena(settings)
    try:
        runner.run(arena.start())
        yield arena
    finally:
        runner.run(arena.stop())


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    """Of all rows so far."""
    return []


@pytest.mark.parametrize("row", rows(only_sample=not RUN_ALL), ids=str)
def test_the_client_sees_a_pause_and_nothing_else(
    row: Row, runner: asyncio.Runner, arena: Arena, prompt: list[int], expected: list[int], outcomes: list[Outcome]
) -> None:
    outcome = Outcome(row)
    outcomes.append(outcome)
    try:
        runner.run(play(row, arena, prompt, expected, outcome))
        outcome.holds = True
    except BaseException as error:
        outcome.what = (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:160]
        raise
    finally:
        if RUN_ALL:
            write_table(outcomes)
        runner.run(make_peace(arena))


async def play(row: Row, arena: Arena, prompt: list[int], expected: list[int], outcome: Outcome) -> None:
    stage, fault = STAGES[row.stage], FAULTS[row.fault]
    asking, answer, before = await bring_to(row, arena, prompt)
    scene = Scene(arena, arena.asked(Role.PREFILL), arena.asked(Role.DECODE))
    moment = time.monotonic()
    await fault.strike(scene)
    stage.leave(scene)
    async with asyncio.timeout(fault.within_s):
        await asking
    if fault.kills_router:
        assert answer.error is not None
        outcome.what = "its connections end; everything it held is freed"
    else:
        assert answer.error is None
        assert answer.tokens == expected
        outcome.pause_s = answer.pause_after(moment)
    await fault.undo(scene)
    arena.fair_weather()
    if not fault.kills_router:
        steps = await arena.recoveries() - before
        outcome.what = ", ".join(f"{remedy} × {count}" for remedy, count in steps.items()) or "goes on"
    await arena.ready()
    await arena.settled()
    outcome.whole_s = time.monotonic() - moment
    fault.verify(scene)


async def bring_to(row: Row, arena: Arena, prompt: list[int]) -> tuple[asyncio.Task[None], Answer, Counter[str]]:
    """A request that is in the row's stage, and the router's recoveries before it. One that was through before it was
    seen there is let go, and another sent."""
    stage = STAGES[row.stage]
    for attempt in range(MOST_ATTEMPTS):
        await arena.ready()
        arena.fair_weather()
        before = await arena.recoveries()
        stage.prepare(arena)
        answer, params = Answer(), {"max_tokens": NUM_OUTPUT, "ignore_eos": True, **PARAMS}
        asking = asyncio.create_task(arena.ask(prompt, answer, cache_salt=f"{row} {attempt}", **params))
        async with asyncio.timeout(30):
            await stage.reached(arena, answer)
        if stage.is_on(answer):
            return asking, answer, before
        await make_peace(arena)
        await asking
        await arena.settled()
    raise AssertionError(f"{MOST_ATTEMPTS} requests were through {row.stage.value} before they were seen there")


async def make_peace(arena: Arena) -> None:
    """Whatever became of the last row, the next one starts well."""
    arena.fair_weather()
    arena.wake_all()
    if arena.redis.pid is None:
        await arena.redis.start()
    await arena.ready()
