"""The worker's HTTP endpoint over loopback, and the embedded server's life."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator

import aiohttp
import pytest

from kvtransfer.fences import Refusals
from proto.control import Role
from proto.errors import SetupError
from service.health import Health
from service.http import HttpServer, worker_app
from service.metrics import WorkerMetrics


@pytest.fixture
def health() -> Health:
    return Health()


@pytest.fixture
async def server(health: Health) -> AsyncIterator[HttpServer]:
    app = worker_app(health.report, WorkerMetrics("m", Role.DECODE, Refusals()).exposition)
    server = HttpServer(app, "127.0.0.1", 0)
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def client(server: HttpServer) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session:
        yield session


async def test_health_follows_readiness(client: aiohttp.ClientSession, health: Health) -> None:
    health.loading("loading weights", 0.5)
    async with client.get("/health") as response:
        assert (response.status, await response.text()) == (503, "loading weights")
    health.ready()
    async with client.get("/health") as response:
        assert (response.status, await response.text()) == (200, "")


async def test_ready_explains_itself(client: aiohttp.ClientSession, health: Health) -> None:
    health.loading("loading weights", 0.5)
    async with client.get("/ready") as response:
        assert response.status == 503
        report = await response.json()
    assert (report["phase"], report["detail"], report["progress"]) == ("loading", "loading weights", 0.5)
    health.ready()
    async with client.get("/ready") as response:
        assert response.status == 200


async def test_live_while_loading_but_not_after_a_failure(client: aiohttp.ClientSession, health: Health) -> None:
    async with client.get("/health/live") as response:
        assert response.status == 200
    health.failed("the engine crashed")
    async with client.get("/health/live") as response:
        assert response.status == 503


async def test_metrics(client: aiohttp.ClientSession) -> None:
    async with client.get("/metrics") as response:
        assert response.headers["content-type"].startswith("text/plain")
        assert "vllm:num_requests_running" in await response.text()


async def test_a_taken_port_is_a_setup_error(server: HttpServer, health: Health) -> None:
    app = worker_app(health.report, WorkerMetrics("m", Role.DECODE, Refusals()).exposition)
    second = HttpServer(app, "127.0.0.1", server.port)
    with pytest.raises(SetupError, match=str(server.port)):
        await second.start()
    await second.stop()


async def test_signals_stay_the_process_s_own(server: HttpServer) -> None:
    async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session, session.get("/health/live"):
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


async def test_stopping_lets_a_response_finish_and_then_refuses() -> None:
    entered, gate = asyncio.Event(), asyncio.Event()

    async def slow(scope: object, receive: object, send: object) -> None:
        assert isinstance(scope, dict)
        if scope["type"] == "http":
            entered.set()
            await gate.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
            await send({"type": "http.response.body", "body": b"done"})  # type: ignore[operator]

    server = HttpServer(slow, "127.0.0.1", 0)
    await server.start()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session:
        asking = asyncio.create_task(session.get("/"))
        await entered.wait()
        stopping = asyncio.create_task(server.stop())
        gate.set()
        response = await asking
        assert await response.read() == b"done"
        await stopping
        with pytest.raises(aiohttp.ClientConnectionError):
            await session.get("/")
    await server.stop()


async def test_stopping_is_limited_in_time() -> None:
    entered = asyncio.Event()

    async def stuck(scope: object, receive: object, send: object) -> None:
        assert isinstance(scope, dict)
        if scope["type"] == "http":
            entered.set()
            await asyncio.Event().wait()

    server = HttpServer(stuck, "127.0.0.1", 0)
    await server.start()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session:
        asking = asyncio.create_task(session.get("/"))
        await entered.wait()
        await server.stop(timeout_s=0.01)
        response = await asking
        assert response.status == 500
