"""Both workers as processes have them, but for the process: what they refuse off the wire is on their /metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import grpc
import pytest

import decode.server
import prefill.server
from kvtransfer.ledger.redis import RedisLedger
from proto.control import Attach, FromWorker, Hello, Peer, Prefill, Rejected, Role
from proto.ids import Epoch, Generation, WorkerId
from proto.layout import WIRE_VERSION
from proto.lifecycle import Stage
from proto.settings import (
    CacheSettings,
    EngineSettings,
    LedgerSettings,
    ModelSettings,
    RpcSettings,
    SchedulerSettings,
    WorkerSettings,
)
from proto.wire import encode_from_router
from service.rpc import WorkerClient, channel, serve
from tandem.local_redis import LocalRedis
from tests.support.checkpoints import make_checkpoint
from tests.support.ledger import handoff
from tests.support.tiers import FIRST, LEASE_S, ROUTER, make_request, prompt_of
from worker.service import TierParts, WorkerContext, WorkerService

GARBAGE = b"\xff\xff"
BUILD: dict[Role, Callable[[WorkerContext], TierParts]] = {
    Role.PREFILL: prefill.server._build,
    Role.DECODE: decode.server._build,
}


class Desk:
    """A running worker, and a client that reads its page."""

    def __init__(self, service: WorkerService, client: aiohttp.ClientSession) -> None:
        assert service._http is not None
        self.address = service._address
        self.url = f"http://127.0.0.1:{service._http.port}/metrics"
        self._client = client

    async def shows(self, *lines: str) -> None:
        async with asyncio.timeout(60):
            while not set(lines) <= set(await self._page()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def _page(self) -> list[str]:
        async with self._client.get(self.url) as response:
            return (await response.text()).splitlines()

    async def hears(self, method: str, *messages: bytes) -> None:
        """One stream with these messages, to its end."""
        async with channel(self.address) as raw:
            call = raw.stream_stream(method)()
            for message in messages:
                await call.write(message)
            try:
                while await call.read() is not grpc.aio.EOF:
                    pass
            except grpc.aio.AioRpcError:
                return


@asynccontextmanager
async def worker(role: Role, redis: LocalRedis, folder: Path) -> AsyncIterator[Desk]:
    engine = EngineSettings(
        model=ModelSettings(
            model=str(make_checkpoint(folder, "qwen3")),
            dtype="float32",
            device="cpu",
            threads=1,
            max_model_len=512,
            skip_warmup=True,
        ),
        cache=CacheSettings(num_gpu_blocks_override=64),
        scheduler=SchedulerSettings(max_num_batched_tokens=64, max_num_seqs=8),
    )
    settings = WorkerSettings(host="127.0.0.1", http_port=0, transports=("grpc",))
    ledger = LedgerSettings(redis=redis.url, namespace="test")
    service = WorkerService(role, engine, settings, ledger, BUILD[role], RpcSettings())
    async with aiohttp.ClientSession() as client:
        try:
            await service.start()
            yield Desk(service, client)
        finally:
            await service.stop()


def refused(reason: str, count: int) -> str:
    return f'tandem_refused_messages_total{{reason="{reason}"}} {count}.0'


@pytest.mark.parametrize("role", list(Role))
async def test_undecodable_bytes_and_words_for_another_incarnation(
    role: Role, local_redis: LocalRedis, tmp_path: Path
) -> None:
    stale = encode_from_router(Hello(ROUTER, Epoch("before"), WIRE_VERSION))
    async with worker(role, local_redis, tmp_path) as desk:
        await desk.shows(refused("malformed", 0), "tandem_damaged_blocks_total 0.0")
        await desk.hears("/tandem.Worker/Serve", GARBAGE)
        await desk.shows(refused("malformed", 1))
        await desk.hears("/tandem.Worker/Serve", stale)
        await desk.shows(refused("malformed", 1), refused("foreign_epoch", 1))


async def test_undecodable_bytes_on_a_hand_off_to_a_decode_worker(local_redis: LocalRedis, tmp_path: Path) -> None:
    async with worker(Role.DECODE, local_redis, tmp_path) as desk:
        await desk.hears("/tandem.Handoff/Exchange", GARBAGE)
        await desk.shows(refused("malformed", 1))


async def test_undecodable_bytes_on_a_hand_off_from_a_decode_worker(local_redis: LocalRedis, tmp_path: Path) -> None:
    async def exchange(_requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        await context.read()
        await context.write(GARBAGE)
        await context.read()

    handler = grpc.stream_stream_rpc_method_handler(exchange)
    server, port = await serve(
        "127.0.0.1", 0, [grpc.method_handlers_generic_handler("tandem.Handoff", {"Exchange": handler})]
    )
    async with worker(Role.PREFILL, local_redis, tmp_path) as desk:
        client = WorkerClient(desk.address)
        stream = await client.connect(Hello(ROUTER, Epoch(""), WIRE_VERSION))
        peer = Peer(WorkerId("d"), Epoch("d-epoch"), f"127.0.0.1:{port}")
        stream.send(Prefill(make_request(1, prompt_of(80)), FIRST, peer, LEASE_S))
        await until(stream.receive, Rejected)
        await desk.shows(refused("malformed", 1))
        await stream.close()
        await client.close()
    await server.stop(None)


async def test_a_write_that_the_ledger_refused(local_redis: LocalRedis, tmp_path: Path) -> None:
    request = make_request(1, prompt_of(80))
    async with RedisLedger(local_redis.url, "test") as ledger, worker(Role.DECODE, local_redis, tmp_path) as desk:
        await ledger.advance(handoff(request.id, 2, Stage.ROUTED))
        await desk.shows("tandem_ledger_refused_writes_total 0.0", "tandem_ledger_malformed_entries_total 0.0")
        client = WorkerClient(desk.address)
        stream = await client.connect(Hello(ROUTER, Epoch(""), WIRE_VERSION))
        stream.send(Attach(request, Generation(1), local=False, lease_s=0.05))
        await until(stream.receive, Rejected)  # its lease has ended, and so its record should
        await desk.shows("tandem_ledger_refused_writes_total 1.0")
        await stream.close()
        await client.close()


async def test_what_its_part_of_the_ledger_went_through(local_redis: LocalRedis, tmp_path: Path) -> None:
    async with worker(Role.DECODE, local_redis, tmp_path) as desk:
        await desk.shows(
            "tandem_ledger_inventories_total 1.0",
            "tandem_ledger_inventory_overflows_total 0.0",
            "tandem_ledger_superseded_heartbeats_total 0.0",
            "tandem_ledger_dropped_records_total 0.0",
        )
        async with RedisLedger(local_redis.url, "test") as ledger:
            await ledger._redis.flushall()
        await desk.shows("tandem_ledger_inventories_total 2.0")


async def test_its_log_says_where_its_page_is(
    local_redis: LocalRedis, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "worker.service")
    async with worker(Role.DECODE, local_redis, tmp_path) as desk:
        assert f"metrics are at {desk.url}" in caplog.messages


async def until(receive: Callable[[], Awaitable[FromWorker]], kind: type[FromWorker]) -> None:
    async with asyncio.timeout(60):
        while not isinstance(await receive(), kind):
            pass
