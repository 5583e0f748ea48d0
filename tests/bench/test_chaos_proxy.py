"""The proxy on its own: what passes, what does not, which bit is flipped, and whose connections are whose."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from bench.chaos.proxy import LARGE_FRAME, Proxy

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS = 0, 1
WITHIN_S = 5.0
STREAM = (1).to_bytes(4, "big")


class Server:
    """Keeps what it was sent, and echoes it."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.writers: list[asyncio.StreamWriter] = []
        self.changed = asyncio.Condition()
        self.port = 0

    async def has(self, num_bytes: int) -> bytes:
        async with asyncio.timeout(WITHIN_S), self.changed:
            await self.changed.wait_for(lambda: len(self.received) >= num_bytes)
        return bytes(self.received)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                async with self.changed:
                    self.received += data
                    self.changed.notify_all()
                writer.write(data)
        writer.close()


@asynccontextmanager
async def proxied(kinds: list[str]) -> AsyncIterator[tuple[Proxy, Server]]:
    """The n-th connection is of the n-th kind."""
    server = Server()
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    left = iter(kinds)
    proxy = Proxy(listening.sockets[0].getsockname()[:2], lambda pid: next(left))
    await proxy.start()
    try:
        yield proxy, server
    finally:
        await proxy.stop()
        listening.close()
        for writer in server.writers:
            writer.transport.abort()


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def echo(self, text: bytes) -> bytes:
        self.send(text)
        return await self.read(len(text))

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def read(self, num_bytes: int) -> bytes:
        async with asyncio.timeout(WITHIN_S):
            return await self._reader.readexactly(num_bytes)

    async def is_ended(self) -> bool:
        async with asyncio.timeout(WITHIN_S):
            try:
                return await self._reader.read(1) == b""
            except ConnectionError:
                return True

    def close(self) -> None:
        self._writer.transport.abort()


@asynccontextmanager
async def client(proxy: Proxy) -> AsyncIterator[Client]:
    made = Client(*await asyncio.open_connection("127.0.0.1", proxy.port))
    try:
        yield made
    finally:
        made.close()


async def test_a_cut_ends_connections_of_one_kind_and_refuses_new_ones_until_it_is_mended() -> None:
    async with proxied(["router", "prefill", "router", "router"]) as (proxy, _):
        async with client(proxy) as router:
            assert await router.echo(b"one") == b"one"
            async with client(proxy) as prefill:
                assert await prefill.echo(b"two") == b"two"
                proxy.set("router", is_cut=True)
                assert await router.is_ended()
                assert await prefill.echo(b"three") == b"three"
        async with client(proxy) as late:
            assert await late.is_ended()
        proxy.set("router", is_cut=False)
        async with client(proxy) as new:
            assert await new.echo(b"four") == b"four"


async def test_silence_holds_everything_up_and_loses_nothing() -> None:
    async with proxied(["router"]) as (proxy, server), client(proxy) as router:
        assert await router.echo(b"before") == b"before"
        proxy.set("router", is_silent=True)
        router.send(b"during")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await router.read(6)
        assert server.received == b"before"
        proxy.set("router", is_silent=False)
        assert await router.read(6) == b"during"


async def test_a_slow_way_delays_each_piece() -> None:
    async with proxied(["router"]) as (proxy, _), client(proxy) as router:
        proxy.set("router", delay_s=0.1)
        start = asyncio.get_running_loop().time()
        assert await router.echo(b"there and back") == b"there and back"
        assert asyncio.get_running_loop().time() - start >= 0.2


def frame(kind: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, 0)) + STREAM + payload


async def test_one_bit_is_flipped_in_each_of_the_next_payloads_and_nothing_else() -> None:
    payload, small = bytes(2 * LARGE_FRAME), bytes(LARGE_FRAME - 1)
    before = PREFACE + frame(HEADERS, payload) + frame(DATA, small)
    sent = before + 3 * frame(DATA, payload)
    async with proxied(["prefill"]) as (proxy, server), client(proxy) as prefill:
        proxy.set("prefill", num_flips=2)
        for start in range(0, len(sent), 1000):  # frames do not end where pieces do
            prefill.send(sent[start : start + 1000])
            await server.has(min(start + 1000, len(sent)))
        got = await server.has(len(sent))
    middle = 9 + LARGE_FRAME
    damaged = [at for at, (mine, theirs) in enumerate(zip(sent, got, strict=True)) if mine != theirs]
    assert damaged == [len(before) + middle, len(before) + len(frame(DATA, payload)) + middle]
    assert all((sent[at] ^ got[at]).bit_count() == 1 for at in damaged)
    assert proxy.num_flipped == proxy.weather("prefill").num_flipped == 2
    proxy.clear()
    assert proxy.num_flipped == 0


async def test_a_connection_belongs_to_the_process_that_opened_it() -> None:
    seen: asyncio.Queue[int] = asyncio.Queue()
    server = Server()
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    proxy = Proxy(listening.sockets[0].getsockname()[:2], lambda pid: seen.put_nowait(pid) or "")
    await proxy.start()
    code = f"import socket; s = socket.create_connection(('127.0.0.1', {proxy.port})); s.recv(1)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    try:
        async with asyncio.timeout(WITHIN_S):
            assert await seen.get() == process.pid
    finally:
        await proxy.stop()
        listening.close()
        async with asyncio.timeout(WITHIN_S):
            await process.wait()
        for writer in server.writers:
            writer.transport.abort()
