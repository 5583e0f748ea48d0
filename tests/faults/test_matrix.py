"""Every stage of a request × every fault: the client sees a pause, and nothing else.

Real processes, a real Redis, a proxy in front of each worker. A stage is reached by what can be seen from outside: by
holding up the bytes that would lead out of it, and by the tokens that the client has. Each row asserts that the
client's tokens are those of an engine that nobody disturbs, that no error came, that the ledger closes, every block is
given back, nothing wrong is cached, and that all of it happens within the stated time.

A sample is run by default; FAULTS=all (``make faults``) runs every row and writes ``docs/faults.md``.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from proto.control import Role
from proto.settings import LogSettings
from tandem import LLM, SamplingParams
from tests.support.arena import Answer, Arena
from tests.support.checkpoints import make_checkpoint
from tests.support.fault_rows import Outcome, Row, rows, write_table
from tests.support.fault_stages import GRPC, NUM_OUTPUT, PROMPT_TOKENS, SHM, STAGES, Scene
from tests.support.faults import FAULTS
from tests.support.stack import stack_settings

MOST_ATTEMPTS = 10
NUM_REPEATED = 8
RUN_ALL = os.environ.get("FAULTS") == "all"
ROWS = rows(only_sample=not RUN_ALL)
PARAMS = {"temperature": 0.8, "top_p": 0.95, "frequency_penalty": 0.3, "seed": 11}
MODEL = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 2048}
NUM_BLOCKS = {GRPC: 600, SHM: 300}
"""Few, where other prompts are to take the place of everything."""


@dataclass
class Request:
    """One that is in a row's stage, and how things stood before it."""

    salt: str
    answer: Answer
    asking: asyncio.Task[None]
    recoveries: Counter[str]
    num_computed: dict[str, int]
    """Prompt tokens computed so far, by worker."""


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
def arena(
    request: pytest.FixtureRequest,
    runner: asyncio.Runner,
    checkpoint: Path,
    expected: list[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Arena]:
    """One for each transport."""
    settings = stack_settings(
        checkpoint,
        prefill=2,
        decode=2,
        transports=(request.param,),
        max_model_len=2048,
        chunk=16,
        num_blocks=NUM_BLOCKS[request.param],
    )
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
    request = await bring_to(row, arena, prompt)
    scene = Scene(arena, arena.asked(Role.PREFILL), arena.asked(Role.DECODE), prompt)
    moment = time.monotonic()
    await fault.strike(scene)
    stage.leave(scene)
    async with asyncio.timeout(fault.within_s):
        await request.asking
    if fault.kills_router:
        assert request.answer.error is not None
        scene.notes.append("its connections end; everything it held is freed")
    else:
        assert request.answer.error is None
        assert request.answer.tokens == expected
        outcome.pause_s = request.answer.pause_after(moment)
    if row.is_computed_once:
        await assert_computed_once(scene, request)
    if fault.is_shortage:
        await assert_repeats(arena, prompt, expected, fault.within_s, cache_salt=f"{request.salt}, meanwhile")
    await fault.undo(scene)
    arena.fair_weather()
    if not fault.kills_router:
        steps = await arena.recoveries() - request.recoveries
        scene.notes.insert(0, ", ".join(f"{remedy} × {count}" for remedy, count in steps.items()) or "goes on")
    await arena.ready()
    await arena.settled()
    outcome.whole_s = time.monotonic() - moment
    fault.verify(scene)
    await assert_repeats(arena, prompt, expected, fault.within_s, cache_salt=request.salt)
    await arena.settled()
    assert await arena.transports_used() == {row.transport}
    outcome.what = "; ".join(scene.notes)


async def assert_computed_once(scene: Scene, request: Request) -> None:
    """D is lost before it has adopted: the other one is served from the blocks that P has."""
    arena = scene.arena
    others = [worker for worker in arena.of(Role.DECODE) if worker is not scene.d]
    for tier, num_tokens in ((arena.of(Role.PREFILL), PROMPT_TOKENS), (others, 0)):
        before = sum(request.num_computed[worker.name] for worker in tier)
        assert await arena.computed(tier) - before == num_tokens
    scene.notes.append("computed once")


async def assert_repeats(
    arena: Arena, prompt: list[int], expected: list[int], within_s: float, *, cache_salt: str
) -> None:
    """The same prompt is answered again, from whatever is cached under ``cache_salt``, and alike."""
    again = Answer()
    async with asyncio.timeout(within_s):
        params = {"max_tokens": NUM_REPEATED, "ignore_eos": True, **PARAMS}
        await arena.ask(prompt, again, cache_salt=cache_salt, **params)
    assert (again.tokens, again.error) == (expected[:NUM_REPEATED], None)


async def bring_to(row: Row, arena: Arena, prompt: list[int]) -> Request:
    """One that was through the row's stage before it was seen there is let go, and another sent."""
    stage = STAGES[row.stage]
    for attempt in range(MOST_ATTEMPTS):
        await arena.ready()
        arena.fair_weather()
        recoveries = await arena.recoveries()
        num_computed = {worker.name: await arena.computed([worker]) for worker in arena.workers}
        stage.prepare(arena)
        salt, answer, params = f"{row} {attempt}", Answer(), {"max_tokens": NUM_OUTPUT, "ignore_eos": True, **PARAMS}
        asking = asyncio.create_task(arena.ask(prompt, answer, cache_salt=salt, **params))
        async with asyncio.timeout(30):
            await stage.reached(arena, answer)
        if stage.is_on(answer):
            return Request(salt, answer, asking, recoveries, num_computed)
        await make_peace(arena)
        await asking
        await arena.settled()
    raise AssertionError(f"{MOST_ATTEMPTS} requests were through {row.stage.value} before they were seen there")


async def make_peace(arena: Arena) -> None:
    """Whatever became of the last row, the next one starts well."""
    await arena.relieve()
    await arena.ready()
