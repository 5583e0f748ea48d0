"""The stream of typed messages over a transport made by hand."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from proto.errors import RemoteProtocolError
from service.rpc.duplex import Duplex, StreamClosed


@dataclass
class Wire:
    """What the peer sends is put into ``incoming`` (None: it closes); what it gets is in ``written``."""

    incoming: asyncio.Queue[bytes | Exception | None] = field(default_factory=asyncio.Queue)
    written: list[bytes] = field(default_factory=list)
    may_write: asyncio.Event = field(default_factory=asyncio.Event)
    write_error: Exception | None = None

    async def read(self) -> bytes | None:
        data = await self.incoming.get()
        if isinstance(data, Exception):
            raise data
        return data

    async def write(self, data: bytes) -> None:
        await self.may_write.wait()
        if self.write_error is not None:
            raise self.write_error
        self.written.append(data)


def decode(data: bytes) -> str:
    if data == b"garbage":
        raise RemoteProtocolError("no message")
    return data.decode()


@pytest.fixture
async def wire() -> Wire:
    return Wire()


@pytest.fixture
async def duplex(wire: Wire) -> Duplex[str, str]:
    duplex = Duplex("the peer", wire.read, wire.write, str.encode, decode, max_outbox=3)
    duplex.start()
    return duplex


async def test_messages_keep_their_order(duplex: Duplex[str, str], wire: Wire) -> None:
    wire.may_write.set()
    for text in ("a", "b", "c"):
        duplex.send(text)
        wire.incoming.put_nowait(text.encode())
    await duplex.flush()
    assert wire.written == [b"a", b"b", b"c"]
    assert [await duplex.receive() for _ in range(3)] == ["a", "b", "c"]
    await duplex.aclose("done")


async def test_what_came_before_the_end_is_still_received(duplex: Duplex[str, str], wire: Wire) -> None:
    for data in (b"a", b"b", None):
        wire.incoming.put_nowait(data)
    assert await duplex.receive() == "a"
    assert await duplex.receive() == "b"
    for _ in range(2):
        with pytest.raises(StreamClosed, match="the peer closed"):
            await duplex.receive()


async def test_an_end_wakes_who_waits(duplex: Duplex[str, str]) -> None:
    waiting = asyncio.ensure_future(duplex.receive())
    await asyncio.sleep(0)
    duplex.end("enough")
    duplex.end("too late to matter")
    with pytest.raises(StreamClosed, match="enough"):
        await waiting


async def test_a_broken_transport_is_an_end(duplex: Duplex[str, str], wire: Wire) -> None:
    wire.incoming.put_nowait(OSError("reset"))
    with pytest.raises(StreamClosed, match="the peer is lost: reset"):
        await duplex.receive()
    assert duplex.fault is None


async def test_a_malformed_message_is_the_peer_s_fault(duplex: Duplex[str, str], wire: Wire) -> None:
    wire.incoming.put_nowait(b"garbage")
    with pytest.raises(StreamClosed, match="broke the protocol"):
        await duplex.receive()
    assert isinstance(duplex.fault, RemoteProtocolError)


async def test_a_full_outbox_ends_the_stream(duplex: Duplex[str, str], wire: Wire) -> None:
    for text in "abcd":
        duplex.send(text)
    assert duplex.is_ended
    with pytest.raises(StreamClosed, match="left 3 messages unread"):
        await duplex.receive()
    await duplex.flush()  # there is nothing left to wait for
    await duplex.aclose("done")
    assert wire.written == []


async def test_sending_after_the_end_does_nothing(duplex: Duplex[str, str], wire: Wire) -> None:
    duplex.end("over")
    duplex.send("a")
    await duplex.aclose("done")
    assert wire.written == []


async def test_a_peer_s_last_words_are_heard_although_it_no_longer_listens(
    duplex: Duplex[str, str], wire: Wire
) -> None:
    wire.write_error = OSError("reset")
    wire.may_write.set()
    duplex.send("a")
    await duplex.flush()
    assert not duplex.is_ended
    wire.incoming.put_nowait(b"no room here")
    wire.incoming.put_nowait(None)
    assert await duplex.receive() == "no room here"
    with pytest.raises(StreamClosed):
        await duplex.receive()
