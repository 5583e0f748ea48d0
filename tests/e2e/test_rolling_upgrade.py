"""A rolling upgrade: each process gives way to one of the next wire version, and no client notices.

    start   prefill-0, prefill-1, decode-0, decode-1, router: this version, all of them
    then    prefill-0, decode-0, router, prefill-1, decode-1, one after the other: its successor comes up beside it and
            hands over blocks, then it gets SIGTERM
    end     the same five of the next version

There is one version of the wire so far, so the next one is made up (``tests.support.next_version``).
"""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import openai
import pytest

from kvtransfer.ledger.redis import RedisLedger
from proto.control import Hello
from proto.ids import Epoch
from proto.layout import WIRE_VERSION
from proto.settings import LedgerSettings
from proto.version import __version__
from service.rpc import WorkerClient
from tandem import LLM, SamplingParams
from tandem.local import StackSettings, child_groups
from tandem.local_redis import LocalRedis
from tandem.machine import Machine
from tandem.supervisor import ChildSpec
from tests.support.checkpoints import make_checkpoint
from tests.support.redis import free_port
from tests.support.stack import stack_settings

ROOT = Path(__file__).parents[2]
NEXT = "-next"
ROLL = ("prefill-0", "decode-0", "router", "prefill-1", "decode-1")
NUM_CLIENTS = 3
NUM_TOKENS = 12
PAUSE_S = 0.05
"""Between an answer and the next question: a trickle, which leaves processes that start some of the machine."""
TIMEOUT_S = 60.0


# ---- the processes ---------------------------------------------------------------------------------------------------


class Fleet:
    """The processes that run now, by name. Each is started and ended by the test, and by nobody else."""

    def __init__(self, settings: StackSettings) -> None:
        groups = child_groups(settings, Machine(cores=2), is_private=True)
        self._specs = {spec.name: spec for group in groups for spec in group}
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self.urls: dict[str, str] = {}
        """Of each router."""

    async def start(self) -> None:
        await asyncio.gather(*(self._start(spec) for spec in self._specs.values()))

    async def start_successor(self, name: str) -> str:
        """Its name. A router is at a port of its own, as a pod is at an address of its own."""
        spec, new = self._specs[name], name + NEXT
        own = {"TANDEM_PORT": str(free_port())} if name == "router" else {"TANDEM_WORKER_ID": new}
        argv = (sys.executable, "-m", "tests.support.next_version", *spec.argv[3:])
        await self._start(replace(spec, name=new, argv=argv, environ={**spec.environ, **own, "PYTHONPATH": str(ROOT)}))
        return new

    async def _start(self, spec: ChildSpec) -> None:
        self._processes[spec.name] = await asyncio.create_subprocess_exec(*spec.argv, env=dict(spec.environ))
        if spec.name.startswith("router"):
            self.urls[spec.name] = f"http://127.0.0.1:{spec.environ['TANDEM_PORT']}"

    def workers(self, role: str) -> list[str]:
        return [name for name in self._processes if name.startswith(role)]

    def check(self) -> None:
        """Nobody ends but by ``end``."""
        ended = {
            name: process.returncode for name, process in self._processes.items() if process.returncode is not None
        }
        assert not ended, ended

    async def end(self, name: str) -> None:
        process = self._processes.pop(name)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(TIMEOUT_S):
            assert await process.wait() == 0, name

    async def close(self) -> None:
        for process in self._processes.values():
            if process.returncode is None:
                process.kill()
            await process.wait()


# ---- the clients -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """Who served one request."""

    router: str
    prefill: str
    decode: str

    @property
    def are_next(self) -> tuple[bool, bool, bool]:
        return self.router.endswith(NEXT), self.prefill.endswith(NEXT), self.decode.endswith(NEXT)


class Clients:
    """They ask one question after the other of ``router``, and know what the answers must be."""

    def __init__(self, fleet: Fleet, questions: list[Question], answers: list[list[int]]) -> None:
        self.router = "router"
        self.ways: list[Way] = []
        self._fleet = fleet
        self._client = openai.AsyncOpenAI(base_url="", api_key="none", max_retries=0)
        self._exam = list(zip(questions, answers, strict=True))
        self._numbers = itertools.count()
        self._num_unheard: Counter[str] = Counter()
        """Requests that a router has not begun to answer."""
        self._news = asyncio.Event()
        self._is_over = False

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        async with self._client, asyncio.TaskGroup() as tasks:
            for _ in range(NUM_CLIENTS):
                tasks.create_task(self._keep_asking())
            try:
                yield
            finally:
                self._is_over = True

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Looks again after every answer."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while not is_so():
                    self._fleet.check()
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise AssertionError(f"served so far: {Counter(self.ways)}") from None

    def is_let_alone(self, router: str) -> bool:
        """Whether it has begun to answer everything that it was sent."""
        return router != self.router and not self._num_unheard[router]

    def have_used(self, name: str) -> bool:
        return any(name in (way.router, way.prefill, way.decode) for way in self.ways)

    def have_used_every_pair(self) -> bool:
        """Whether each version of prefill worker that is here has handed over to each of decode worker, by word of
        this router."""
        pairs = itertools.product(self._fleet.workers("prefill"), self._fleet.workers("decode"))
        return {Way(self.router, *pair).are_next for pair in pairs} <= {way.are_next for way in self.ways}

    async def _keep_asking(self) -> None:
        while not self._is_over:
            await self._ask(*self._exam[next(self._numbers) % len(self._exam)])
            await asyncio.sleep(PAUSE_S)

    async def _ask(self, question: Question, expected: list[int]) -> None:
        router = self.router
        self._num_unheard[router] += 1
        reply = await self._client.with_options(base_url=f"{self._fleet.urls[router]}/v1").completions.create(
            model="tiny",
            prompt=question.prompt,
            max_tokens=NUM_TOKENS,
            temperature=question.temperature,
            seed=question.seed,
            stream=True,
            stream_options={"include_timings": True},  # type: ignore[typeddict-unknown-key]
            extra_body={
                "return_token_ids": True,
                "ignore_eos": True,
                "cache_salt": f"{next(self._numbers)}",  # nobody has the blocks: they are computed, and travel
            },
        )
        self._num_unheard[router] -= 1
        tokens, timings = [], {}
        async for chunk in reply:
            tokens += [token for choice in chunk.choices for token in choice.token_ids]
            timings = getattr(chunk, "timings", None) or timings
        assert tokens == expected
        assert timings["kv_bytes_moved"] > 0
        self.ways.append(Way(router, timings["prefill_workers"][0], timings["decode_workers"][0]))
        self._news.set()


@dataclass(frozen=True)
class Question:
    prompt: list[int]
    temperature: float
    seed: int


def make_questions() -> list[Question]:
    rng = random.Random(11)
    lengths = (40, 300, 17, 150, 64, 220, 33)
    return [
        Question([rng.randrange(5, 300) for _ in range(length)], 0.8 * (at % 2), at)
        for at, length in enumerate(lengths)
    ]


def without_faults(checkpoint: Path, questions: list[Question]) -> list[list[int]]:
    llm = LLM(model=str(checkpoint), dtype="float32", max_model_len=1024, threads=1, num_gpu_blocks_override=600)
    outputs = llm.generate(
        [{"prompt_token_ids": question.prompt} for question in questions],
        [
            SamplingParams(max_tokens=NUM_TOKENS, temperature=each.temperature, seed=each.seed, ignore_eos=True)
            for each in questions
        ],
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


# ---- what is seen from outside ---------------------------------------------------------------------------------------


async def wire_versions(ledger: RedisLedger) -> dict[str, int]:
    """What each worker says that it speaks."""
    found = {}
    for record in await ledger.workers():
        client = WorkerClient(record.address)
        stream = await client.connect(Hello(Epoch("a visitor"), record.epoch, WIRE_VERSION))
        found[record.worker] = stream.welcome.wire_version
        await stream.close()
        await client.close()
    return found


async def is_ready(url: str) -> bool:
    """Whether the router there serves with two workers of each role."""
    try:
        async with aiohttp.ClientSession() as http, http.get(f"{url}/ready") as reply:
            details = (await reply.json())["details"]
            return reply.status == 200 and (details["prefill_workers"], details["decode_workers"]) == (2, 2)
    except aiohttp.ClientError:
        return False


async def release(url: str) -> str:
    async with aiohttp.ClientSession() as http, http.get(f"{url}/version") as reply:
        version: str = (await reply.json())["version"]
        return version


async def eventually(fleet: Fleet, is_so: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not await is_so():  # type: ignore[misc]
            fleet.check()
            await asyncio.sleep(0.05)


# ---- the upgrade -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("upgrade"), "llama")


async def replaced(name: str, fleet: Fleet, clients: Clients) -> None:
    """Returns when the old process is gone and those that are left have worked with each other."""
    successor = await fleet.start_successor(name)
    if name == "router":
        await eventually(fleet, lambda: is_ready(fleet.urls[successor]))
        clients.router = successor  # as a load balancer would
        await clients.until(lambda: clients.is_let_alone(name))
    await clients.until(lambda: clients.have_used(successor))
    await fleet.end(name)
    num_before = len(clients.ways)
    await clients.until(lambda: len(clients.ways) > num_before + NUM_CLIENTS and clients.have_used_every_pair())


async def test_a_rolling_upgrade_loses_nothing(checkpoint: Path) -> None:
    questions = make_questions()
    answers = without_faults(checkpoint, questions)
    async with LocalRedis() as redis, RedisLedger(redis.url, "tandem") as ledger:
        settings = stack_settings(checkpoint, prefill=2, decode=2)
        fleet = Fleet(
            replace(settings, ledger=LedgerSettings(redis=redis.url), router=replace(settings.router, port=free_port()))
        )
        clients = Clients(fleet, questions, answers)
        try:
            await fleet.start()
            await eventually(fleet, lambda: is_ready(fleet.urls["router"]))
            assert await release(fleet.urls["router"]) == __version__
            async with clients.at_work():
                await clients.until(clients.have_used_every_pair)
                assert set((await wire_versions(ledger)).values()) == {WIRE_VERSION}
                for name in ROLL:
                    await replaced(name, fleet, clients)
            assert await release(fleet.urls[clients.router]) != __version__
            workers = [*fleet.workers("prefill"), *fleet.workers("decode")]
            assert await wire_versions(ledger) == dict.fromkeys(workers, WIRE_VERSION + 1)
            assert {way.are_next for way in clients.ways} == set(itertools.product((False, True), repeat=3))

            async def is_nothing_open() -> bool:
                return not await ledger.open_handoffs()

            await eventually(fleet, is_nothing_open)
        finally:
            await fleet.close()
