"""Shared memory: when it is used, when it is not, and that a mapping does not outlive the process it belongs to."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest

from kvtransfer.fences import FenceTable
from kvtransfer.session import ReceiveSession, SendSession
from kvtransfer.transport import Link
from kvtransfer.transports import GRPC, MEMORY, InlineReader, LocatedWriter
from kvtransfer.transports import grpc as grpc_link
from kvtransfer.transports.choice import transport_offers
from kvtransfer.transports.memory import MemoryNetwork
from kvtransfer.transports.shm import ShmReader, read_export, shm_offer
from proto.control import Peer
from proto.errors import RemoteProtocolError
from proto.handoff import Located
from proto.ids import BlockId, Epoch, WorkerId
from proto.layout import MemoryExport
from service.rpc import serve
from tests.support.handoff import CHOICES, SHARED_LAYOUT, Ear, SharedStore, Store, Tier, content, make_offer

ROOT = Path(__file__).parents[2]
P = Epoch("p")
BLOCK_BYTES = SHARED_LAYOUT.block_bytes


@pytest.fixture
def store() -> Iterator[SharedStore]:
    store = SharedStore(4, SHARED_LAYOUT)
    yield store
    store.close()


async def test_a_source_shows_the_peers_blocks(store: SharedStore) -> None:
    reader = ShmReader()
    source = await reader.open(shm_offer(store.export()).detail, P, store)
    assert source is not None
    store.write(BlockId(2), content(make_offer(1).hashes[0], BLOCK_BYTES))
    [place] = await LocatedWriter(store).payloads([BlockId(2)])
    view = source.fetch(place)
    assert view == store.read(BlockId(2))
    assert view.readonly
    view.release()
    source.close()
    reader.close()


async def test_one_mapping_serves_all_hand_offs_of_an_incarnation(store: SharedStore) -> None:
    reader, detail = ShmReader(), shm_offer(store.export()).detail
    sources = [await reader.open(detail, P, store) for _ in range(3)]
    assert reader.num_mappings == 1
    for source in sources:
        assert source is not None
        source.close()
        source.close()
    assert reader.num_mappings == 1  # kept for the next
    reader.forget(P)
    reader.forget(P)
    assert reader.num_mappings == 0


async def test_a_mapping_in_use_outlives_its_epoch(store: SharedStore) -> None:
    reader = ShmReader()
    source = await reader.open(shm_offer(store.export()).detail, P, store)
    assert source is not None
    reader.close()
    view = source.fetch(Located(0))
    assert bytes(view) == bytes(BLOCK_BYTES)
    view.release()
    source.close()


@pytest.mark.parametrize("offset", [1, BLOCK_BYTES - 1, 4 * BLOCK_BYTES, 1 << 40])
async def test_a_place_where_no_block_lies(store: SharedStore, offset: int) -> None:
    reader = ShmReader()
    source = await reader.open(shm_offer(store.export()).detail, P, store)
    assert source is not None
    with pytest.raises(RemoteProtocolError):
        source.fetch(Located(offset))
    with pytest.raises(RemoteProtocolError):
        source.fetch(b"inline")
    assert await source.place([Located(offset)], [BlockId(0)], Store(1, SHARED_LAYOUT)) == [False]
    source.close()
    reader.close()


@pytest.mark.parametrize(
    "change",
    [
        lambda export: replace(export, nonce=b"another nonce..."),
        lambda export: replace(export, pid=(1 << 22) + 1),
        lambda export: replace(export, fd=9999),
        lambda export: replace(export, num_bytes=export.num_bytes - 1, nonce_offset=export.nonce_offset - 1),
        lambda export: replace(export, nonce_offset=0),
    ],
)
async def test_memory_that_is_not_what_was_meant_is_not_used(
    store: SharedStore, change: Callable[[MemoryExport], MemoryExport]
) -> None:
    assert await ShmReader().open(shm_offer(change(store.export())).detail, P, store) is None


async def test_a_pipe_is_no_memory_and_is_not_waited_for(store: SharedStore) -> None:
    ours, theirs = os.pipe()
    try:
        export = MemoryExport(os.getpid(), ours, 116, 100, b"sixteen bytes ok")
        assert await ShmReader().open(shm_offer(export).detail, P, store) is None
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize(
    "fields",
    [b"", b"\xc1", *(msgpack.packb(each) for each in ([], 7, ["1", 2, 3, 4, b"n"], [1, 2, 300, -1, b"n"]))],
)
def test_malformed_details_are_not_understood(fields: bytes) -> None:
    assert read_export(fields) is None


def test_details_survive_the_wire() -> None:
    export = MemoryExport(12, 7, 4112, 4096, bytes(16))
    assert read_export(shm_offer(export).detail) == export
    assert read_export(msgpack.packb([12, 7, 4112, 4096, bytes(16), "of a newer version"])) == export
    for bad in (
        replace(export, nonce=b""),
        replace(export, nonce_offset=4100),
        MemoryExport(True, 7, 4112, 4096, bytes(16)),
    ):
        assert read_export(shm_offer(bad).detail) is None


async def test_blocks_change_owner_by_one_copy(store: SharedStore) -> None:
    network, reader, ear = MemoryNetwork(), ShmReader(), Ear()
    tier = Tier(Store(4, SHARED_LAYOUT))

    async def on_link(link: Link) -> None:
        await ReceiveSession(link, tier.store, tier, FenceTable(Epoch("d"), 9.0), readers=(reader,)).run()

    network.serve("d", on_link)
    offer = make_offer(4, layout=SHARED_LAYOUT, transports=transport_offers(("auto",), store))
    session = SendSession(offer, store, network.connect, Peer(WorkerId("d"), Epoch("d"), "d"), ear)
    session.blocks_ready(0, store.fill(offer))
    session.seal(4, SHARED_LAYOUT.block_size, CHOICES)
    await session.run()
    await network.drain()
    assert ear.transport == "shm"
    assert tier.holds(offer)
    assert tier.num_bytes == 4 * BLOCK_BYTES
    reader.close()


async def test_a_block_that_changed_under_the_reader_is_noticed(store: SharedStore) -> None:
    """P lets go and reuses a block while D is late: what D reads then is not what was promised."""
    network, reader, ear = MemoryNetwork(), ShmReader(), Ear()
    tier = Tier(Store(4, SHARED_LAYOUT))

    async def on_link(link: Link) -> None:
        await ReceiveSession(link, tier.store, tier, FenceTable(Epoch("d"), 9.0), readers=(reader,)).run()

    network.serve("d", on_link)
    offer = make_offer(2, layout=SHARED_LAYOUT, transports=transport_offers(("shm",), store))
    session = SendSession(offer, store, network.connect, Peer(WorkerId("d"), Epoch("d"), "d"), ear)
    blocks = store.fill(offer)
    running = asyncio.create_task(session.run())
    session.blocks_ready(0, blocks[:1])
    await ear.until("granted")
    await session._blocks.sum(0)
    store.write(blocks[0], bytes(BLOCK_BYTES))
    await ear.until("held")
    session.withdraw("nobody else")
    await running
    assert tier.freed_with == [(0, "corrupt")]
    assert ear.told == ["granted", "held", "released"]
    await network.drain()
    reader.close()


@pytest.mark.parametrize(("allowed", "transport"), [("shm", "shm"), ("grpc", "grpc")])
async def test_between_two_processes(allowed: str, transport: str) -> None:
    reader = ShmReader()
    readers = (reader, InlineReader(GRPC)) if allowed == "shm" else (InlineReader(GRPC), InlineReader(MEMORY))
    tier = Tier(Store(24, SHARED_LAYOUT))
    fences = FenceTable(Epoch("d"), 100.0)

    async def on_link(link: Link) -> None:
        await ReceiveSession(link, tier.store, tier, fences, readers=readers).run()

    server, port = await serve("127.0.0.1", 0, [grpc_link.handoff_handler(on_link)])
    arguments = (sys.executable, "-m", "tests.support.shm_sender", f"127.0.0.1:{port}", "d", "24")
    sender = await asyncio.create_subprocess_exec(*arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert sender.stdin is not None
    assert sender.stdout is not None
    assert (await sender.stdout.readline()).decode().split() == [transport, "granted", "adopted", "released"]
    assert tier.told == ["reserve", "sealed", "adopted"]
    assert tier.holds(make_offer(24, layout=SHARED_LAYOUT))
    assert reader.num_mappings == (1 if transport == "shm" else 0)
    ended = asyncio.Event()
    if transport == "shm":
        mapping = reader._mappings[P]
        retire = mapping.retire
        mapping.retire = lambda: (retire(), ended.set())  # type: ignore[method-assign, assignment]
    sender.stdin.close()
    await sender.wait()
    if transport == "shm":
        await ended.wait()
    assert reader.num_mappings == 0  # its memory is not kept behind it
    await server.stop(None)
