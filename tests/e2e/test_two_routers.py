"""Two routers before the same workers: every process is restarted under load, and then one router is killed.

Who asks the other router meanwhile notices nothing.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from redis.asyncio import Redis

from proto.control import Role
from tandem import LLM, SamplingParams
from tandem.supervisor import Child
from tests.support.answer import Answer
from tests.support.arena import Arena, total
from tests.support.checkpoints import make_checkpoint
from tests.support.stack import stack_settings

MAX_LEN = 32_768
FOR_EVER = 32_000
"""So many tokens take longer than anybody waits here."""
NUM_LONG = 250
NUM_SHORT = 60
FREED_S = 20.0
"""From a router's death until nothing is left of it. Its leases end five seconds after its streams, and the streams of
the other one take their time here, too; a lease that nobody cuts short would last longer."""


@dataclass(frozen=True, slots=True)
class Question:
    prompt: list[int]
    params: Mapping[str, float | int]


def prompt_of(num_tokens: int) -> list[int]:
    rng = random.Random(num_tokens)
    return [rng.randrange(5, 300) for _ in range(num_tokens)]


QUESTIONS = (
    Question(prompt_of(40), {"temperature": 0.0}),
    Question(prompt_of(300), {"temperature": 0.8, "seed": 7, "frequency_penalty": 0.3}),
)
Tokens = list[list[int]]
"""For each question."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("routers"), "qwen2", max_position_embeddings=MAX_LEN)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Tokens:
    """What one engine says that nobody disturbs."""
    with LLM(str(checkpoint), dtype="float32", max_model_len=1024, threads=1, num_gpu_blocks_override=600) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": question.prompt} for question in QUESTIONS],
            [SamplingParams(max_tokens=NUM_LONG, ignore_eos=True, **each.params) for each in QUESTIONS],  # type: ignore[arg-type]
        )
        return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def arena(runner: asyncio.Runner, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    settings = stack_settings(checkpoint, prefill=2, decode=2, num_blocks=5000, max_model_len=MAX_LEN)
    settings = replace(settings, worker=replace(settings.worker, drain_timeout=30.0))
    arena = Arena(settings, tmp_path_factory.mktemp("logs"), num_routers=2)
    try:
        runner.run(arena.start())
        yield arena
    finally:
        runner.run(arena.stop())


def ask(arena: Arena, number: int, answer: Answer, *, router: int, max_tokens: int) -> asyncio.Task[None]:
    question = QUESTIONS[number]
    asking = arena.ask(
        question.prompt, answer, router=router, max_tokens=max_tokens, ignore_eos=True, **question.params
    )
    return asyncio.create_task(asking)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


class Clients:
    """Each asks its question again and again, of the next router of ``routers``, and compares what it is told."""

    def __init__(self, arena: Arena, expected: Tokens) -> None:
        self.routers = [0, 1]
        self._arena = arena
        self._expected = expected
        self._num_answers = [0] * len(QUESTIONS)
        self._is_over = False

    async def _keep_asking(self, number: int) -> None:
        while not self._is_over:
            router = self.routers[self._num_answers[number] % len(self.routers)]
            answer = Answer()
            await ask(self._arena, number, answer, router=router, max_tokens=NUM_SHORT)
            assert (answer.error, answer.tokens) == (None, self._expected[number][:NUM_SHORT])
            self._num_answers[number] += 1

    async def go_on(self) -> None:
        """Until each has had an answer to what it asked from here on."""
        before = list(self._num_answers)
        await until(lambda: all(now >= then + 2 for now, then in zip(self._num_answers, before, strict=True)))

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as tasks:
            for number in range(len(QUESTIONS)):
                tasks.create_task(self._keep_asking(number))
            try:
                yield
            finally:
                self._is_over = True


def test_a_rolling_restart_of_every_process_loses_nothing(
    runner: asyncio.Runner, arena: Arena, expected: Tokens
) -> None:
    runner.run(restart_all(arena, expected))


async def restart_all(arena: Arena, expected: Tokens) -> None:
    clients = Clients(arena, expected)
    async with clients.at_work():
        for keeps in (False, True):
            await restart_redis(arena, clients, keeps=keeps)
        for number in (0, 1):
            await restart_router(arena, clients, number, expected)
        for p, d in zip(arena.of(Role.PREFILL), arena.of(Role.DECODE), strict=True):
            await asyncio.gather(restart(p.child), restart(d.child))
            await clients.go_on()
            await arena.ready()
    assert sorted(arena.deaths()) == sorted(f"{child.spec.name}: died (exit status 0)" for child in arena.processes)
    await arena.settled()


async def restart(child: Child) -> None:
    before = child.pid
    child.signal(signal.SIGTERM)
    await until(lambda: child.pid not in (None, before))


async def restart_redis(arena: Arena, clients: Clients, *, keeps: bool) -> None:
    """It comes back with what it wrote into its file, or empty."""
    assert arena.redis.pid is not None
    async with Redis.from_url(arena.redis.url) as redis:
        await redis.set("mark", "")
        if keeps:
            await redis.config_set("save", "3600 1")
    os.kill(arena.redis.pid, signal.SIGTERM)
    assert await arena.redis.wait() == 0
    await clients.go_on()
    await arena.redis.kill()
    await arena.redis.start()
    async with Redis.from_url(arena.redis.url) as redis:
        assert bool(await redis.exists("mark")) is keeps
    await clients.go_on()
    await arena.ready()


async def restart_router(arena: Arena, clients: Clients, number: int, expected: Tokens) -> None:
    """Whoever asks anew goes to the other one. What this one has it finishes, though it takes a while."""
    clients.routers = [1 - number]
    child, begun, late = arena.routers[number].child, Answer(), Answer()
    asking = ask(arena, 1, begun, router=number, max_tokens=NUM_LONG)
    await begun.has(4)
    for worker in arena.of(Role.DECODE):
        arena.freeze(worker.child)
    before = child.pid
    child.signal(signal.SIGTERM)
    while "the router is shutting down" not in (await arena.readiness(number))["reasons"]:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    await ask(arena, 0, late, router=number, max_tokens=NUM_SHORT)
    assert late.error is not None
    assert late.error.startswith("503")
    assert len(begun.tokens) < NUM_LONG
    arena.wake_all()
    await asking
    assert (begun.error, begun.tokens) == (None, expected[1])
    await until(lambda: child.pid not in (None, before))
    await arena.ready()
    clients.routers = [0, 1]
    await clients.go_on()


def test_a_router_that_is_killed_takes_nothing_but_its_own_streams_along(
    runner: asyncio.Runner, arena: Arena, expected: Tokens
) -> None:
    runner.run(kill_one(arena, expected))


async def kill_one(arena: Arena, expected: Tokens) -> None:
    await arena.ready()
    numbers = range(len(QUESTIONS))
    num_generated, recoveries = await generated(arena), await arena.recoveries(1)
    doomed, safe = [Answer() for _ in numbers], [Answer() for _ in numbers]
    tasks = [ask(arena, number, doomed[number], router=0, max_tokens=FOR_EVER) for number in numbers]
    for answer in doomed:
        await answer.has(4)
    tasks += [ask(arena, number, safe[number], router=1, max_tokens=NUM_LONG) for number in numbers]
    for answer in safe:
        await answer.has(4)
    pid = arena.routers[0].child.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    moment = time.monotonic()
    assert all(answer.finish is None for answer in doomed)
    assert any(answer.finish is None for answer in safe), "the first may be over by the time that the last has begun"
    await asyncio.gather(*tasks)
    assert all(answer.error is not None for answer in doomed)
    assert [(answer.error, answer.tokens) for answer in safe] == [(None, tokens) for tokens in expected]
    assert await arena.recoveries(1) == recoveries, "nothing had to be made good"
    await arena.settled()
    assert time.monotonic() - moment < FREED_S
    assert await generated(arena) - num_generated < FOR_EVER, "nobody went on to the end for nobody"
    await arena.ready()
    back = Answer()
    await ask(arena, 1, back, router=0, max_tokens=NUM_SHORT)
    assert (back.error, back.tokens) == (None, expected[1][:NUM_SHORT])
    await arena.settled()


async def generated(arena: Arena) -> float:
    """Tokens, by all decode workers as they are now."""
    pages = [await arena.metrics(worker.http_port) for worker in arena.of(Role.DECODE)]
    return sum(total(page, "tandem_generated_tokens_total") for page in pages)
