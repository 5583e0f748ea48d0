"""How a worker finds its place before its model is loaded: the address that it gives out, and the Redis it is given."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis.asyncio import Redis

import decode.server
from kvtransfer.ledger.redis import RedisLedger
from proto.control import Role
from proto.errors import CheckpointError, SettingsError
from proto.settings import (
    CacheSettings,
    EngineSettings,
    LedgerSettings,
    ModelSettings,
    RpcSettings,
    WorkerSettings,
)
from tandem.local_redis import LocalRedis
from tests.support.checkpoints import make_checkpoint
from tests.support.redis import free_port
from worker.service import WorkerService, advertised

ANYWHERE = WorkerSettings().host


def decode_worker(redis_url: str, model: Path, host: str = "127.0.0.1") -> WorkerService:
    engine = EngineSettings(
        model=ModelSettings(model=str(model), dtype="float32", device="cpu", threads=1, skip_warmup=True),
        cache=CacheSettings(num_gpu_blocks_override=64),
    )
    ledger = LedgerSettings(redis=redis_url, namespace="test")
    settings = WorkerSettings(host=host, worker_id="d0", transports=("grpc",))
    return WorkerService(Role.DECODE, engine, settings, ledger, decode.server._build, RpcSettings())


@pytest.mark.parametrize(
    ("host", "advertise", "expected"),
    [
        ("10.0.0.2", None, "10.0.0.2:7"),
        ("fd00::2", None, "[fd00::2]:7"),
        (ANYWHERE, "pod-7", "pod-7:7"),
        (ANYWHERE, "pod-7:9000", "pod-7:9000"),
        (ANYWHERE, "fd00::2", "[fd00::2]:7"),
        (ANYWHERE, "[fd00::2]", "[fd00::2]:7"),
        (ANYWHERE, "[fd00::2]:9000", "[fd00::2]:9000"),
        ("127.0.0.1", "10.0.0.2", "10.0.0.2:7"),
    ],
)
def test_a_worker_goes_by_what_it_is_told(host: str, advertise: str | None, expected: str) -> None:
    assert advertised(WorkerSettings(host=host, advertise=advertise), 7, "10.0.0.1") == expected


@pytest.mark.parametrize("advertise", ["", "pod-7:", "pod-7:grpc", "http://pod-7"])
def test_what_nobody_could_dial_is_refused(advertise: str) -> None:
    with pytest.raises(SettingsError, match="--advertise"):
        advertised(WorkerSettings(advertise=advertise), 7, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
async def test_a_worker_that_listens_anywhere_goes_by_what_those_at_redis_can_dial(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str
) -> None:
    asked: list[str | None] = []

    def own_address(peer: str | None) -> str:
        asked.append(peer)
        return "10.0.0.2"

    monkeypatch.setattr("worker.service.own_address", own_address)
    port = free_port()
    for url in (f"redis://127.0.0.1:{port}/0", f"unix://{tmp_path}/no.sock"):
        service = decode_worker(url, tmp_path, host)
        with pytest.raises(CheckpointError):
            await service.start()
        assert service._address.startswith("10.0.0.2:")
        await service.stop()
    assert asked == ["127.0.0.1", None]


async def test_a_wrong_password_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    port = free_port()
    async with LocalRedis(port=port):
        service = decode_worker(f"redis://:wrong@127.0.0.1:{port}/0", tmp_path)
        with pytest.raises(SettingsError, match="another user or password"):
            await service.start()
        await service.stop()


async def test_a_redis_that_evicts_is_warned_of(
    local_redis: LocalRedis, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Redis.from_url(local_redis.url) as raw:
        await raw.config_set("maxmemory-policy", "allkeys-lru")
    service = decode_worker(local_redis.url, tmp_path)
    with pytest.raises(CheckpointError):
        await service.start()
    await service.stop()
    assert "maxmemory-policy is allkeys-lru" in caplog.text


async def test_a_worker_starts_without_redis_and_is_known_once_it_comes(tmp_path: Path) -> None:
    redis = LocalRedis(port=free_port())
    service = decode_worker(redis.url, make_checkpoint(tmp_path, "qwen3"))
    try:
        await service.start()
        async with redis, RedisLedger(redis.url, "test") as ledger:
            await service._publisher.settled()  # type: ignore[union-attr]
            assert [record.worker for record in await ledger.workers()] == ["d0"]
    finally:
        await service.stop()
