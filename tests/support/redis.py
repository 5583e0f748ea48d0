"""A real Redis for each test that asks for one: private, empty, and gone afterwards. And two ways to make it full."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from redis.asyncio import Redis
from redis.exceptions import ResponseError

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


async def exhaust_memory(redis: LocalRedis) -> None:
    """From now on it refuses every write that may need memory, as at its ``maxmemory``."""
    async with Redis.from_url(redis.url) as client:
        await client.config_set("maxmemory", 1)
        with pytest.raises(ResponseError, match="used memory"):
            await client.set("a write", "")


async def give_memory(redis: LocalRedis) -> None:
    async with Redis.from_url(redis.url) as client:
        await client.config_set("maxmemory", 0)


async def fill_disk(redis: LocalRedis) -> None:
    """It was told to save, and no file of its may grow: from its next try on it refuses every write."""
    _limit_files(redis, 0)
    async with Redis.from_url(redis.url) as client:
        await client.config_set("save", "3600 1")
        await client.bgsave()
        while (await client.info("persistence"))["rdb_last_bgsave_status"] != "err":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        with pytest.raises(ResponseError, match="MISCONF"):
            await client.set("a write", "")


async def clear_disk(redis: LocalRedis) -> None:
    _limit_files(redis, resource.RLIM_INFINITY)
    async with Redis.from_url(redis.url) as client:
        await client.config_set("save", "")


def _limit_files(redis: LocalRedis, num_bytes: int) -> None:
    assert redis.pid is not None
    resource.prlimit(redis.pid, resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
