"""The router as a process: HTTP in front, scripted workers behind gRPC, and a real ledger in between."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from redis.asyncio import Redis

from kvtransfer.ledger.records import WorkerRecord
from kvtransfer.ledger.redis import RedisLedger
from proto.control import Attach, FromRouter, Load, LoadReport, ModelCard, Prefill, Progress, Role, Tokens, Welcome
from proto.errors import SettingsError
from proto.hashing import BlockHasher, hash_key
from proto.health import HealthReport, Phase
from proto.ids import Epoch, Generation, RequestId, WorkerId
from proto.layout import WIRE_VERSION
from proto.lifecycle import Stage
from proto.request import FinishReason, TokenOut
from proto.settings import CacheSettings, LedgerSettings, ModelSettings, RouterSettings
from router.admission import seeds_from
from router.server import RouterService
from service.rpc import RouterStream, StreamClosed, serve, worker_handler
from tandem.local_redis import LocalRedis
from tests.support.http import model_card, served_model
from tests.support.ledger import until
from tests.support.redis import free_port

LETTERS = served_model().encode("abcd", add_special_tokens=False)
LOAD = Load(num_running=3, num_blocks=10, num_free_blocks=5)
IDLE = Load(num_blocks=10, num_free_blocks=10)
PROMPT = "a prompt of some length, which is sent twice"


class ScriptedWorker:
    """Answers every request with "abcd": the first token from prefill, the others from decode."""

    def __init__(self, name: str, role: Role, load: Load = LOAD) -> None:
        self.load = load
        self.num_bytes = 100
        self.hangs_up = False
        """End the next stream on which a request comes."""
        self.report = HealthReport(Phase.READY, True)
        self.name, self.role, self.epoch = WorkerId(name), role, Epoch(f"epoch-{name}")
        self.got: list[FromRouter] = []
        self.may_speak = asyncio.Event()
        self.may_speak.set()
        self.streams: list[RouterStream] = []

    async def describe(self) -> ModelCard:
        return model_card()

    async def health(self) -> HealthReport:
        return self.report

    async def serve(self, stream: RouterStream) -> None:
        self.streams.append(stream)
        stream.send(Welcome(self.name, self.epoch, self.role, WIRE_VERSION))
        stream.send(LoadReport(self.load))
        try:
            while True:
                message = await stream.receive()
                self.got.append(message)
                if self.hangs_up and isinstance(message, Attach):
                    self.hangs_up = False
                    return
                if isinstance(message, (Prefill, Attach)):
                    await self.may_speak.wait()
                    self.answer(stream, message)
        except StreamClosed:
            pass

    def answer(self, stream: RouterStream, message: Prefill | Attach) -> None:
        request, generation = message.request.id, message.generation
        last = len(LETTERS) - 1
        tokens = [
            TokenOut(request, 0, at, token, finish=FinishReason.LENGTH if at == last else None)
            for at, token in enumerate(LETTERS)
        ]
        start = len(message.request.forced[0]) if message.request.forced else 0
        if isinstance(message, Prefill):
            tokens = tokens[:1]
        elif not message.local:
            stream.send(Progress(request, generation, Stage.ADOPTED, num_bytes=self.num_bytes))
            tokens = tokens[1:]
        else:
            tokens = tokens[start:]
        stream.send(Tokens(((request, generation),), tuple(tokens)))


class Town:
    """A router service, its ledger as workers see it, and the workers that were started."""

    def __init__(self, service: RouterService, ledger: RedisLedger, http: aiohttp.ClientSession) -> None:
        self.service, self.ledger, self.http = service, ledger, http
        self._servers: dict[WorkerId, tuple[WorkerRecord, object]] = {}

    async def add(self, worker: ScriptedWorker, policy: str = "priority") -> ScriptedWorker:
        handler = worker_handler(worker.describe, worker.health, worker.serve)
        server, port = await serve("127.0.0.1", 0, [handler])
        record = WorkerRecord(
            worker=worker.name,
            role=worker.role,
            epoch=worker.epoch,
            address=f"127.0.0.1:{port}",
            layout="layout",
            numerics="n",
            model="tiny",
            model_digest="digest",
            block_size=16,
            num_blocks=10,
            scheduling_policy=policy,
        )
        self._servers[worker.name] = (record, server)
        await self.ledger.register(record)
        await until(lambda: any(c.worker == worker.name and c.is_usable for c in self.service.registry.view().workers))
        return worker

    async def kill(self, worker: ScriptedWorker) -> None:
        _, server = self._servers.pop(worker.name)
        await server.stop(None)  # type: ignore[attr-defined]

    async def get(self, path: str) -> tuple[int, str]:
        async with self.http.get(f"http://127.0.0.1:{self.service.port}{path}") as response:
            return response.status, await response.text()

    async def is_ready(self, path: str = "/ready") -> bool:
        return (await self.get(path))[0] == 200

    async def complete(self, prompt: str = PROMPT, **more: int) -> tuple[int, dict[str, object]]:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, **more}
        async with self.http.post(f"http://127.0.0.1:{self.service.port}/v1/completions", json=body) as response:
            return response.status, json.loads(await response.text())

    async def close(self) -> None:
        for _, server in self._servers.values():
            await server.stop(None)  # type: ignore[attr-defined]


@asynccontextmanager
async def town(redis: LocalRedis, *, seed: int | None = None, **router: float) -> AsyncIterator[Town]:
    service = RouterService(
        RouterSettings(host="127.0.0.1", port=0, **{"disagg_threshold": 0, "drain_timeout": 5.0, **router}),  # type: ignore[arg-type]
        LedgerSettings(redis=redis.url, namespace="test"),
        ModelSettings(seed=seed),
        CacheSettings(prefix_hash_key="secret"),
    )
    await service.start()
    async with RedisLedger(redis.url, "test", ttl_s=60.0) as ledger, aiohttp.ClientSession() as http:
        made = Town(service, ledger, http)
        try:
            yield made
        finally:
            await service.stop()
            await made.close()


async def eventually(is_so: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def canary_of(prefill: ScriptedWorker) -> Prefill:
    return next(message for message in prefill.got if isinstance(message, Prefill))


def text_of(body: dict[str, object]) -> str:
    return body["choices"][0]["text"]  # type: ignore[index,no-any-return]


async def test_from_an_empty_house_to_an_answer(local_redis: LocalRedis) -> None:
    async with town(local_redis) as place:
        assert (await place.get("/health/live"))[0] == 200
        status, reasons = await place.get("/ready")
        assert status == 503
        assert "no decode worker is connected" in reasons
        status, body = await place.complete()
        assert status == 503
        assert "no worker has been seen yet" in str(body)

        await place.add(ScriptedWorker("d1", Role.DECODE))
        prefill = await place.add(ScriptedWorker("p1", Role.PREFILL))
        await eventually(lambda: place.is_ready("/health"))
        assert RequestId(f"{place.service.epoch}.1") == canary_of(prefill).request.id
        assert await place.ledger.handoff(canary_of(prefill).request.id) is None
        status, body = await place.complete()
        assert status == 200, body
        assert text_of(body) == "abcd"
        assert [type(message) for message in prefill.got][:1] == [Prefill]

        _, metrics = await place.get("/metrics")
        assert 'tandem_workers{role="decode"} 1.0' in metrics
        assert 'vllm:num_requests_running{model_name="tiny"} 6.0' in metrics
        assert 'vllm:generation_tokens_total{model_name="tiny"} 4.0' in metrics
        assert 'tandem_routed_total{target="prefill"} 1.0' in metrics
        assert "tandem_inflight_requests 0.0" in metrics
        assert 'tandem_requests_total{finish="length"} 1.0' in metrics


async def test_a_priority_is_honoured_or_refused_by_what_the_workers_say_of_themselves(local_redis: LocalRedis) -> None:
    async with town(local_redis) as place:
        decode = await place.add(ScriptedWorker("d1", Role.DECODE, load=IDLE))
        await place.add(ScriptedWorker("p1", Role.PREFILL, load=IDLE))
        assert (await place.complete(priority=-3))[0] == 200
        assert [message.request.priority for message in decode.got if isinstance(message, Attach)] == [-3]
        await place.add(ScriptedWorker("p2", Role.PREFILL, load=IDLE), policy="fcfs")
        status, body = await place.complete(priority=-3)
        assert (status, body["error"]["param"]) == (400, "priority")  # type: ignore[index]
        assert (await place.complete(priority=0))[0] == (await place.complete())[0] == 200
        assert sum(isinstance(message, Attach) for message in decode.got) == 3


async def test_a_path_on_which_no_kv_travels_is_not_ready(local_redis: LocalRedis) -> None:
    async with town(local_redis, canary_interval=0.05) as place:
        decode = await place.add(ScriptedWorker("d1", Role.DECODE, load=IDLE))
        await place.add(ScriptedWorker("p1", Role.PREFILL, load=IDLE))
        await eventually(place.is_ready)
        decode.num_bytes = 0

        async def fails() -> bool:
            status, body = await place.get("/ready")
            return status == 503 and "p1 \u2192 d1: the answer came, and no KV moved" in json.loads(body)["reasons"][0]

        await eventually(fails)
        decode.num_bytes = 100
        await eventually(place.is_ready)
        _, metrics = await place.get("/metrics")
        assert "tandem_inflight_requests 0.0" in metrics
        assert (
            "vllm:generation_tokens_total" not in metrics or 'generation_tokens_total{model_name="tiny"} 0.0' in metrics
        )
        assert await place.ledger.open_handoffs() == []


async def test_a_worker_that_makes_no_progress_is_named_and_not_used(local_redis: LocalRedis) -> None:
    async with town(local_redis, health_interval=0.05) as place:
        stalled = await place.add(ScriptedWorker("d1", Role.DECODE))
        await place.add(ScriptedWorker("p1", Role.PREFILL))
        await place.add(ScriptedWorker("d2", Role.DECODE))
        stalled.report = HealthReport(Phase.READY, False, "no step for 60 s")

        async def is_named() -> bool:
            return "d1: no step for 60 s" in (await place.get("/ready"))[1]

        await eventually(is_named)
        for _ in range(3):
            assert (await place.complete())[0] == 200
        assert not any(isinstance(message, Attach) for message in stalled.got)


async def test_what_it_refuses_of_workers_and_of_the_ledger_is_on_its_page(
    local_redis: LocalRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with town(local_redis) as place, Redis.from_url(local_redis.url) as raw:
        worker = await place.add(ScriptedWorker("d1", Role.DECODE))
        stranger = RequestId("another router.1")
        worker.streams[0].send(Tokens(((stranger, Generation(1)),), (TokenOut(stranger, 0, 0, 5),)))
        monkeypatch.setattr(worker.streams[0]._duplex, "_encode", lambda message: b"\xff\xff")
        worker.streams[0].send(LoadReport(LOAD))
        await until(lambda: len(worker.streams) == 2)  # it connects again
        await raw.hset("test:workers", "bad", "e9")
        await raw.set("test:worker:bad", b"\xc1 nonsense")

        async def is_counted() -> bool:
            _, page = await place.get("/metrics")
            return (
                'tandem_refused_messages_total{reason="unknown"} 1.0' in page
                and 'tandem_refused_messages_total{reason="malformed"} 1.0' in page
                and re.search(r"^tandem_ledger_malformed_entries_total [1-9]", page, re.MULTILINE) is not None
                and "tandem_ledger_refused_writes_total 0.0" in page
            )

        await eventually(is_counted)


async def test_an_open_handoff_is_on_the_ledger_and_then_closed(local_redis: LocalRedis) -> None:
    async with town(local_redis) as place:
        decode = await place.add(ScriptedWorker("d1", Role.DECODE))
        await place.add(ScriptedWorker("p1", Role.PREFILL))
        decode.may_speak.clear()
        answer = asyncio.ensure_future(place.complete())
        request = RequestId(f"{place.service.epoch}.1")  # nobody asked /ready, so no canary came first

        async def stage(wanted: Stage) -> bool:
            record = await place.ledger.handoff(request)
            return record is not None and record.stage is wanted

        await eventually(lambda: stage(Stage.SEALED))
        (opened,) = await place.ledger.open_handoffs()
        assert (opened.request, opened.prefill_epoch, opened.decode_epoch) == (request, "epoch-p1", "epoch-d1")
        decode.may_speak.set()
        assert (await answer)[0] == 200
        await eventually(lambda: stage(Stage.FINISHED))
        assert await place.ledger.open_handoffs() == []


async def test_a_cached_prefix_is_found_by_the_secret_hash(local_redis: LocalRedis) -> None:
    async with town(local_redis, disagg_threshold=16) as place:
        await place.add(ScriptedWorker("p1", Role.PREFILL))
        decode = await place.add(ScriptedWorker("d1", Role.DECODE))
        await place.complete()
        first = next(message for message in decode.got if isinstance(message, Attach))
        assert not first.local
        hashes = BlockHasher("ns", 16, hash_key("secret")).full_blocks(first.request.prompt)
        await place.ledger.replace(decode.name, decode.epoch, 1, hashes)
        await until(lambda: place.service.index.num_hashes(decode.epoch) == len(hashes))
        await place.complete()
        assert next(m for m in reversed(decode.got) if isinstance(m, Attach)).local


async def test_a_dead_decode_worker_costs_no_answer(local_redis: LocalRedis) -> None:
    async with town(local_redis) as place:
        await place.add(ScriptedWorker("p1", Role.PREFILL))
        first = await place.add(ScriptedWorker("d1", Role.DECODE))
        first.may_speak.clear()
        answer = asyncio.ensure_future(place.complete())
        await until(lambda: any(isinstance(message, Attach) for message in first.got))
        second = await place.add(ScriptedWorker("d2", Role.DECODE))
        await place.kill(first)
        status, body = await answer
        assert (status, text_of(body)) == (200, "abcd")
        attach = next(message for message in second.got if isinstance(message, Attach))
        assert attach.generation == 2


async def test_a_stream_that_breaks_costs_no_second_try(local_redis: LocalRedis) -> None:
    async with town(local_redis) as place:
        await place.add(ScriptedWorker("p1", Role.PREFILL))
        decode = await place.add(ScriptedWorker("d1", Role.DECODE))
        decode.hangs_up = True
        status, body = await place.complete()
        assert (status, text_of(body)) == (200, "abcd")
        attaches = [message for message in decode.got if isinstance(message, Attach)]
        assert [attach.generation for attach in attaches] == [1, 1]
        assert len(decode.streams) == 2
        _, metrics = await place.get("/metrics")
        assert "tandem_recoveries_total{" not in metrics


async def test_a_request_during_shutdown_is_told_when_to_come_back(local_redis: LocalRedis) -> None:
    async with town(local_redis) as place:
        await place.add(ScriptedWorker("d1", Role.DECODE))
        place.service.flow.close()
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4}
        url = f"http://127.0.0.1:{place.service.port}/v1/completions"
        async with place.http.post(url, json=body) as response:
            assert response.status == 503
            assert int(response.headers["retry-after"]) >= 1


async def test_without_redis_the_known_workers_go_on(local_redis: LocalRedis) -> None:
    async with town(local_redis) as place:
        await place.add(ScriptedWorker("p1", Role.PREFILL))
        await place.add(ScriptedWorker("d1", Role.DECODE))
        await local_redis.stop()
        assert (await place.complete())[0] == 200

        async def missed() -> bool:
            return "the ledger in Redis is away: ConnectionError" in (await place.get("/ready"))[1]

        await eventually(missed)
        await eventually(place.is_ready)


async def test_a_router_starts_without_redis_says_why_and_finds_the_workers_once_it_comes() -> None:
    port = free_port()
    redis = LocalRedis(port=port)
    async with town(redis) as place:

        async def reasons() -> str:
            return (await place.get("/ready"))[1]

        async def says_why() -> bool:
            return f"the ledger in Redis is away: ConnectionError: Error 111 connecting to 127.0.0.1:{port}" in (
                await reasons()
            )

        await eventually(says_why)
        assert redis.url.split(":")[2].partition("@")[0] not in await reasons(), "that is the password"
        async with redis:
            await place.add(ScriptedWorker("d1", Role.DECODE))
            await eventually(place.is_ready)
            assert "Redis" not in await reasons()


async def test_a_router_that_redis_does_not_let_in_does_not_start() -> None:
    port = free_port()
    async with LocalRedis(port=port):
        service = RouterService(
            RouterSettings(host="127.0.0.1", port=0),
            LedgerSettings(redis=f"redis://:wrong@127.0.0.1:{port}/0"),
            ModelSettings(),
            CacheSettings(),
        )
        with pytest.raises(SettingsError, match="another user or password"):
            await service.start()
        await service.stop()


async def test_a_router_warns_of_a_redis_that_evicts(local_redis: LocalRedis, caplog: pytest.LogCaptureFixture) -> None:
    async with Redis.from_url(local_redis.url) as raw:
        await raw.config_set("maxmemory-policy", "allkeys-lru")
    async with town(local_redis):
        assert "maxmemory-policy is allkeys-lru" in caplog.text


async def test_stopping_lets_those_inside_finish(local_redis: LocalRedis) -> None:
    async with town(local_redis) as place:
        await place.add(ScriptedWorker("p1", Role.PREFILL))
        decode = await place.add(ScriptedWorker("d1", Role.DECODE))
        decode.may_speak.clear()
        answer = asyncio.ensure_future(place.complete())
        await until(lambda: any(isinstance(message, Attach) for message in decode.got))
        stopping = asyncio.ensure_future(place.service.stop())

        async def unready() -> bool:
            return (await place.get("/ready"))[0] == 503

        await eventually(unready)
        assert (await place.complete())[0] == 503
        decode.may_speak.set()
        status, body = await answer
        assert (status, text_of(body)) == (200, "abcd")
        await stopping


async def test_what_does_not_finish_in_time_is_told_so(local_redis: LocalRedis) -> None:
    async with town(local_redis, drain_timeout=0.0) as place:
        await place.add(ScriptedWorker("p1", Role.PREFILL))
        decode = await place.add(ScriptedWorker("d1", Role.DECODE))
        decode.may_speak.clear()
        answer = asyncio.ensure_future(place.complete())
        await until(lambda: any(isinstance(message, Attach) for message in decode.got))
        await place.service.stop()
        status, body = await answer
        assert status == 503
        assert "shutting down" in str(body)
        decode.may_speak.set()


def test_a_router_needs_to_know_where_redis_is() -> None:
    with pytest.raises(SettingsError, match="Redis"):
        RouterService(RouterSettings(), LedgerSettings(), ModelSettings(), CacheSettings())


async def test_workers_are_told_the_lease_that_was_set(local_redis: LocalRedis) -> None:
    async with town(local_redis, lease_s=7.0) as place:
        await place.add(ScriptedWorker("d1", Role.DECODE))
        prefill = await place.add(ScriptedWorker("p1", Role.PREFILL))
        await eventually(lambda: place.is_ready("/health"))
        assert canary_of(prefill).lease_s == 7.0


async def test_requests_without_a_seed_draw_theirs_from_the_routers(local_redis: LocalRedis) -> None:
    async with town(local_redis, seed=1) as place:
        await place.add(ScriptedWorker("d1", Role.DECODE))
        prefill = await place.add(ScriptedWorker("p1", Role.PREFILL))
        await eventually(lambda: place.is_ready("/health"))
        for _ in range(2):
            assert (await place.complete())[0] == 200
        drawn = [got.request.seed for got in prefill.got if isinstance(got, Prefill)]
    expected = seeds_from(1)
    assert drawn[-2:] == [expected(), expected()], "canaries draw none"
