"""A prefill and a decode tier in one process: real engines and sessions, an in-memory link, a scripted router."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from decode.tier import DecodeTier
from engine.build import load_engine_parts
from engine.core import EngineCore
from kvtransfer.fences import FenceTable, Refusals
from kvtransfer.transport import Link, LinkLost
from kvtransfer.transports import MEMORY
from kvtransfer.transports.choice import payload_readers
from kvtransfer.transports.memory import Fault, pair
from prefill.handoff import Dispatcher
from prefill.tier import PrefillTier
from proto.control import Attach, FromRouter, FromWorker, Load, Peer, Prefill, Progress, Role, Tokens
from proto.ids import Epoch, Generation, RequestId, WorkerId
from proto.inventory import CacheChange
from proto.lifecycle import Stage
from proto.request import Request, SamplingParams, TokenOut
from proto.settings import CacheSettings, EngineSettings, ModelSettings, SchedulerSettings
from service.metrics import WorkerMetrics
from service.rpc import StreamClosed
from worker.host import EngineHost, StepNews
from worker.routers import RouterStreams

ROUTER = Epoch("router")
M = TypeVar("M", bound=FromWorker)


class ScriptedRouter:
    """The router's end of one worker's stream: what it was sent, and a way to wait for more."""

    def __init__(self) -> None:
        self.router_epoch = ROUTER
        self.received: list[FromWorker] = []
        self._news = asyncio.Event()
        self._ended = asyncio.Event()

    async def receive(self) -> FromRouter:
        await self._ended.wait()
        raise StreamClosed("the test is over")

    def end(self) -> None:
        self._ended.set()

    def send(self, message: FromWorker) -> None:
        self.received.append(message)
        self._news.set()

    def of(self, kind: type[M]) -> list[M]:
        return [message for message in self.received if isinstance(message, kind)]

    def tokens(self) -> list[TokenOut]:
        return [token for message in self.of(Tokens) for token in message.tokens]

    def stages(self) -> list[Stage]:
        return [message.stage for message in self.of(Progress)]

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._news.clear()
            await self._news.wait()


@dataclass
class Side:
    """One worker: its engine, its tier, and the router's end of its stream."""

    host: EngineHost
    routers: RouterStreams
    router: ScriptedRouter
    peer: Peer
    tier: PrefillTier | DecodeTier = field(init=False)
    metrics: WorkerMetrics = field(init=False)
    serving: asyncio.Task[None] = field(init=False)

    def started(self, request: RequestId) -> None:
        self.tier.started(request)

    def stepped(self, news: StepNews) -> None:
        self.tier.stepped(news)

    def load_changed(self, load: Load) -> None:
        """Nobody asks."""

    def cache_changed(self, events: list[CacheChange]) -> None:
        """There is no ledger."""

    def crashed(self, error: BaseException) -> None:
        self.tier.crashed(error)

    def page(self) -> list[str]:
        """The lines of its /metrics."""
        return self.metrics.exposition()[0].decode().splitlines()

    async def is_idle(self) -> bool:
        return await self.host.call(lambda core: (core.check_integrity(), core.is_idle())[1])


class Pod:
    """``sides`` by worker name; ``connect`` reaches any decode worker by its address."""

    def __init__(self, checkpoint: Path, *, num_blocks: int = 64, chunk: int = 64, kv: str = "auto") -> None:
        self.settings = EngineSettings(
            model=ModelSettings(
                model=str(checkpoint), dtype="float32", device="cpu", threads=1, max_model_len=512, skip_warmup=True
            ),
            cache=CacheSettings(num_gpu_blocks_override=num_blocks, kv_cache_dtype=kv),
            scheduler=SchedulerSettings(max_num_batched_tokens=chunk, max_num_seqs=8),
        )
        self.forth: Fault | None = None
        """Meddles with what prefill workers send."""
        self.orphans: list[tuple[RequestId, Generation]] = []
        self._news = asyncio.Event()
        self._decode: dict[str, DecodeTier] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.sides: list[Side] = []

    async def prefill(self, name: str = "p0", *, max_held: int = 8, transport: str = MEMORY) -> Side:
        side, fences, metrics = await self._side(Role.PREFILL, name)
        dispatcher = Dispatcher(side.host, self.connect, (transport,), epoch=side.peer.epoch, refusals=fences.refusals)
        side.tier = PrefillTier(
            side.host,
            side.routers,
            dispatcher,
            fences,
            epoch=side.peer.epoch,
            metrics=metrics,
            max_held=max_held,
            orphaned=self._orphaned,
        )
        await side.tier.open()
        return side

    async def decode(self, name: str = "d0") -> Side:
        side, fences, metrics = await self._side(Role.DECODE, name)
        side.tier = DecodeTier(
            side.host,
            side.routers,
            fences,
            payload_readers([MEMORY], side.peer.epoch),
            metrics=metrics,
            orphaned=self._orphaned,
        )
        self._decode[side.peer.address] = side.tier
        return side

    async def _side(self, role: Role, name: str) -> tuple[Side, FenceTable, WorkerMetrics]:
        peer = Peer(WorkerId(name), Epoch(f"{name}-epoch"), name)
        side = Side.__new__(Side)
        side.host = EngineHost(self.settings, side)
        side.routers, side.router, side.peer = RouterStreams(), ScriptedRouter(), peer
        await side.host.open(lambda phase, seconds: None)
        side.serving = asyncio.create_task(side.routers.serve(side.router, lambda message: None))
        self._tasks.append(side.serving)
        await asyncio.sleep(0)  # the stream is known from here on
        self.sides.append(side)
        refusals = Refusals()
        side.metrics = WorkerMetrics("test", role, refusals)
        return side, FenceTable(peer.epoch, 600.0, refusals), side.metrics

    def _orphaned(self, request: RequestId, generation: Generation) -> None:
        self.orphans.append((request, generation))
        self._news.set()

    async def orphaned(self, count: int) -> None:
        while len(self.orphans) < count:
            self._news.clear()
            await self._news.wait()

    async def lose_router(self, *sides: Side) -> None:
        """Its streams end, for good."""
        for side in sides:
            side.router.end()
        await asyncio.wait([side.serving for side in sides])

    async def connect(self, peer: Peer) -> Link:
        if peer.address not in self._decode:
            raise LinkLost("nobody is there")
        ours, theirs = pair(forth=self.forth)
        self._tasks.append(asyncio.create_task(self._decode[peer.address].serve(theirs)))
        return ours

    async def close(self) -> None:
        for side in self.sides:
            await side.tier.close()
            side.router.end()
        await asyncio.gather(*self._tasks)
        for side in self.sides:
            await side.host.close()


def make_request(number: int, prompt: tuple[int, ...], *, max_tokens: int = 6, n: int = 1, **params: float) -> Request:
    sampling = SamplingParams(n=n, max_tokens=max_tokens, seed=number, ignore_eos=True, **params).checked()  # type: ignore[arg-type]
    return Request(id=RequestId(f"{ROUTER}.{number}"), prompt=prompt, params=sampling)


FIRST = Generation(1)
LEASE_S = 60.0


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(f"{length}/{seed}")
    return tuple(rng.randrange(5, 300) for _ in range(length))


def alone(pod: Pod, request: Request) -> dict[tuple[int, int], int]:
    """What one engine makes of the request: (choice, position) to token."""
    parts = load_engine_parts(pod.settings)
    try:
        core = EngineCore(parts.runner, parts.kv, parts.facts, parts.hasher)
        core.add(request)
        tokens = {}
        while core.has_work():
            tokens |= {(token.choice, token.position): token.token for token in core.step().tokens}
        return tokens
    finally:
        parts.kv.close()


def send(p: Side, d: Side, request: Request, generation: Generation = FIRST) -> None:
    d.tier.handle(Attach(request, generation, local=False, lease_s=LEASE_S))
    p.tier.handle(Prefill(request, generation, d.peer, LEASE_S))


def served(*sides: Side) -> dict[tuple[int, int], int]:
    """The router's view: each position once, whoever said it; two that differ are an error."""
    tokens: dict[tuple[int, int], int] = {}
    for side in sides:
        for token in side.router.tokens():
            assert tokens.setdefault((token.choice, token.position), token.token) == token.token
    return tokens


def num_finished(side: Side) -> int:
    return sum(token.finish is not None for token in side.router.tokens())


async def until_idle(side: Side) -> None:
    """Blocks are given back once nobody reads or writes them, a little after the abort."""
    for _ in range(1000):
        if await side.is_idle():
            return
    raise AssertionError("blocks are still held")
