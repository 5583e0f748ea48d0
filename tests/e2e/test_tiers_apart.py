"""Each tier as a command of its own, meeting at one Redis: joining, leaving, and models that do not belong together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tandem.local_redis import LocalRedis
from tests.support.checkpoints import make_checkpoint
from tests.support.redis import free_port

TIMEOUT_S = 90.0


class Apart:
    """Commands started by hand. ``router`` answers at ``url``."""

    def __init__(self, redis_url: str, folder: Path) -> None:
        self._redis_url = redis_url
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def run(self, name: str, *argv: str) -> None:
        environ = {key: value for key, value in os.environ.items() if not key.startswith("TANDEM_")}
        environ |= {"TANDEM_REDIS": self._redis_url, "OMP_NUM_THREADS": "1"}
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "tandem", *argv], env=environ, stdout=log, stderr=log
            )

    def router(self) -> None:
        self.run("router", "router", "--host", "127.0.0.1", "--port", str(self.port), "--disagg-threshold", "0")

    def worker(self, role: str, model: Path, number: int = 0) -> None:
        limits = ("--dtype", "float32", "--max-model-len", "512", "--num-gpu-blocks-override", "128", "--device", "cpu")
        name = f"{role}-{number}"
        self.run(name, role, str(model), "--host", "127.0.0.1", "--worker-id", name, *limits)

    def end(self, name: str) -> int:
        process = self._processes.pop(name)
        process.send_signal(signal.SIGTERM)
        return process.wait(TIMEOUT_S)

    def ended(self, name: str) -> tuple[int, str]:
        """By itself: its exit status, and all that it wrote."""
        status = self._processes[name].wait(TIMEOUT_S)
        del self._processes[name]
        return status, (self._folder / f"{name}.log").read_text()

    def end_all(self) -> None:
        for name in list(self._processes):
            self.end(name)

    def get(self, path: str) -> tuple[int, dict[str, object]]:
        return self._read(urllib.request.Request(self.url + path))

    def ask(self, seed: int = 1) -> tuple[int, dict[str, object]]:
        body = {"prompt": list(range(5, 105)), "max_tokens": 8, "seed": seed, "return_token_ids": True}
        headers = {"Content-Type": "application/json"}
        return self._read(urllib.request.Request(self.url + "/v1/completions", json.dumps(body).encode(), headers))

    def _read(self, request: urllib.request.Request) -> tuple[int, dict[str, object]]:
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)
        except (urllib.error.URLError, ConnectionError) as error:
            return 0, {"error": str(error)}

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            for name, process in self._processes.items():
                assert process.poll() is None, (self._folder / f"{name}.log").read_text()
            assert time.monotonic() < deadline, self.get("/ready")
            time.sleep(0.05)


@pytest.fixture
async def apart(tmp_path: Path) -> AsyncIterator[Apart]:
    async with LocalRedis(port=free_port()) as redis:
        apart = Apart(redis.url, tmp_path)
        try:
            yield apart
        finally:
            apart.end_all()


def test_workers_join_and_leave_at_any_time(apart: Apart, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "qwen3")
    apart.router()
    apart.until(lambda: apart.get("/health")[0] != 0 or apart.get("/version")[0] == 200)
    assert apart.get("/ready")[0] == 503, "nobody serves yet, and the router says so"
    status, reply = apart.ask()
    assert status == 503
    assert reply["error"]["message"]  # type: ignore[index]
    apart.worker("decode", model)
    apart.until(lambda: apart.get("/ready")[0] == 200)
    status, alone = apart.ask()
    assert status == 200, "with no prefill worker the decode worker computes the prompt itself"
    apart.worker("prefill", model)
    apart.worker("decode", model, 1)
    apart.until(lambda: set(members(apart)) == {"prefill-0", "decode-0", "decode-1"})
    assert tokens(apart.ask()[1]) == tokens(alone)
    assert apart.end("decode-0") == 0
    apart.until(lambda: set(members(apart)) == {"prefill-0", "decode-1"})
    assert tokens(apart.ask()[1]) == tokens(alone)
    assert apart.end("prefill-0") == 0
    assert tokens(apart.ask()[1]) == tokens(alone)


def tokens(reply: dict[str, object]) -> object:
    return reply["choices"][0]["token_ids"]  # type: ignore[index]


def members(apart: Apart) -> list[str]:
    """Names on the ledger, as any tool may read them."""
    import asyncio

    from kvtransfer.ledger.redis import RedisLedger

    async def read() -> list[str]:
        async with RedisLedger(apart._redis_url, "tandem") as ledger:
            return [record.worker for record in await ledger.workers()]

    return asyncio.run(read())


def test_two_models_do_not_serve_one_request(apart: Apart, tmp_path: Path) -> None:
    """Same shape, other weights: the blocks of one would be noise to the other."""
    apart.router()
    apart.worker("prefill", make_checkpoint(tmp_path / "a", "llama", seed=1))
    apart.until(lambda: members(apart) == ["prefill-0"])
    apart.worker("decode", make_checkpoint(tmp_path / "b", "llama", seed=2))
    apart.until(lambda: len(members(apart)) == 2)
    apart.until(lambda: "layout" in str(apart.get("/ready")[1]) or "model" in str(apart.get("/ready")[1]))
    status, reply = apart.ask()
    assert status == 503, reply
    message = str(reply["error"]["message"])  # type: ignore[index]
    assert "model" in message


async def test_whom_redis_does_not_let_in_says_so_and_ends(tmp_path: Path) -> None:
    port = free_port()
    async with LocalRedis(port=port):
        stranger = Apart(f"redis://:wrong@127.0.0.1:{port}/0", tmp_path)
        try:
            stranger.router()
            stranger.worker("decode", tmp_path)
            for name in ("router", "decode-0"):
                status, said = stranger.ended(name)
                assert status == 2, said
                assert "error: Redis wants another user or password in its URL" in said
                assert "wrong@" not in said
        finally:
            stranger.end_all()
