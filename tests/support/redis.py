"""A real Redis for each test that asks for one: private, empty, and gone afterwards."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import pytest_asyncio

from kvtransfer.ledger.redis import RedisLedger
from tandem.local_redis import LocalRedis


@pytest_asyncio.fixture
async def local_redis() -> AsyncIterator[LocalRedis]:
    async with LocalRedis() as redis:
        yield redis


@pytest_asyncio.fixture
async def ledger(local_redis: LocalRedis) -> AsyncIterator[RedisLedger]:
    async with RedisLedger(local_redis.url, "test") as ledger:
        yield ledger


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
