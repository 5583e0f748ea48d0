"""A TCP proxy that misbehaves on demand: stops, slows, cuts, or flips bits of what passes through it.

It knows which process opened a connection (by the system's socket table), so that the network between two processes
can fail while everybody else's goes on. Linux only. Knows HTTP/2's frame headers, to hit payloads; nothing above them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

CHUNK = 1 << 14
LARGE_FRAME = 2048
"""An HTTP/2 DATA frame of at least so many bytes is taken for payload."""
_PREFACE = len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")


@dataclass(slots=True)
class Weather:
    """The state of the network for the connections of one kind of client. Change it with ``Proxy.set``."""

    pass_bytes: float = float("inf")
    """How many bytes a client's connections may still send, all together; then they stall, half-open."""
    is_silent: bool = False
    """Nothing passes, in either direction, and nothing says so."""
    is_cut: bool = False
    """Connections are reset, and new ones refused."""
    delay_s: float = 0.0
    """Before each chunk, in either direction."""
    num_flips: int = 0
    """Large frames towards the server that get one bit flipped each."""
    num_flipped: int = 0
    num_sent: int = 0
    """Bytes that clients of this kind have sent and that were passed on."""
    num_stalls: int = 0
    """How often bytes of theirs had to wait."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Proxy:
    """In front of one server. ``kind_of`` names the kind of a client from its process id (0: unknown)."""

    def __init__(self, target: tuple[str, int], kind_of: Callable[[int], str]) -> None:
        self._target = target
        self._kind_of = kind_of
        self._weather: dict[str, Weather] = {}
        self._writers: dict[asyncio.StreamWriter, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=CHUNK)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def num_flipped(self) -> int:
        """Bits flipped since the last ``clear``, whoever sent them."""
        return sum(weather.num_flipped for weather in self._weather.values())

    def weather(self, kind: str) -> Weather:
        return self._weather.setdefault(kind, Weather())

    def set(self, kind: str, **changes: float | bool) -> None:
        weather = self.weather(kind)
        for name, value in changes.items():
            setattr(weather, name, value)
        if weather.is_cut:
            for writer, owner in list(self._writers.items()):
                if owner == kind:
                    writer.transport.abort()
        weather.notify()

    def clear(self) -> None:
        """Fair weather again, and counts from zero. What was held up arrives late, and in order."""
        for kind, old in list(self._weather.items()):
            self._weather[kind] = Weather()
            old.notify()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        upstream: asyncio.StreamWriter | None = None
        try:
            # In a thread, because it reads the whole of /proc while others' bytes want to pass.
            pid = await asyncio.to_thread(owner_of, writer.get_extra_info("peername")[1], self.port)
            kind = self._kind_of(pid)
            back, upstream = await asyncio.open_connection(*self._target, limit=CHUNK)
            if self.weather(kind).is_cut:
                return
            self._writers[writer] = self._writers[upstream] = kind
            pumps = [
                asyncio.ensure_future(self._pump(reader, upstream, kind, Frames())),
                asyncio.ensure_future(self._pump(back, writer, kind, None)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            return  # cancelled by stop() alone; asyncio's streams take a handler that ends so for a fault
        finally:
            self._tasks.discard(task)
            for each in (writer, upstream):
                if each is not None:
                    self._writers.pop(each, None)
                    each.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: str, frames: Frames | None
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                weather = self.weather(kind)
                if frames is not None and weather.pass_bytes <= 0:
                    weather.num_stalls += 1
                    weather.notify()
                while weather.is_silent or (frames is not None and weather.pass_bytes <= 0):
                    await weather.changed.wait()
                    weather = self.weather(kind)
                if weather.delay_s:
                    await asyncio.sleep(weather.delay_s)
                if frames is not None:
                    data = frames.damage(data, weather)
                    weather.pass_bytes -= len(data)
                    weather.num_sent += len(data)
                    weather.notify()
                writer.write(data)
                await writer.drain()


class Frames:
    """Follows one client's HTTP/2 frames through the chunks that carry them."""

    def __init__(self) -> None:
        self._header = bytearray()
        self._skip = _PREFACE
        self._flip_in: int | None = None

    def damage(self, data: bytes, weather: Weather) -> bytes:
        """``data`` with one bit flipped in the middle of each large DATA frame, while the weather has flips left."""
        damaged, at = bytearray(data), 0
        while at < len(data):
            if self._skip:
                step = min(self._skip, len(data) - at)
                if self._flip_in is not None and self._flip_in < step:
                    damaged[at + self._flip_in] ^= 0x10
                    weather.num_flipped += 1
                    self._flip_in = None
                elif self._flip_in is not None:
                    self._flip_in -= step
                self._skip -= step
                at += step
                continue
            step = min(9 - len(self._header), len(data) - at)
            self._header += data[at : at + step]
            at += step
            if len(self._header) == 9:
                length, kind = int.from_bytes(self._header[:3], "big"), self._header[3]
                self._header.clear()
                self._skip = length
                if kind == 0 and length >= LARGE_FRAME and weather.num_flips > 0:
                    weather.num_flips -= 1
                    self._flip_in = length // 2
        return bytes(damaged)


def owner_of(port: int, remote_port: int) -> int:
    """The process on this machine whose TCP socket connects local ``port`` to ``remote_port``; 0: none is found."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if tuple(int(address.rsplit(":", 1)[1], 16) for address in fields[1:3]) == (port, remote_port):
                    inodes.add(f"socket:[{fields[9]}]")
    me = os.getpid()
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == me:
            continue
        with contextlib.suppress(OSError):
            for fd in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(fd) in inodes:
                        return int(process.name)
    return 0
