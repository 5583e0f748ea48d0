"""NIXL without its library: the agents are made up, and everything above them is what runs. With it, where it is."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from pathlib import Path

import msgpack
import pytest

from kvtransfer.fences import FenceTable
from kvtransfer.session import ReceiveSession, SendSession
from kvtransfer.transport import Link
from kvtransfer.transports import grpc as grpc_link
from kvtransfer.transports import inline_offers
from kvtransfer.transports.choice import allowed_names, payload_readers, transport_offers
from kvtransfer.transports.device import PeerSource
from kvtransfer.transports.memory import MemoryNetwork
from kvtransfer.transports.nixl import NixlReader, nixl_offer, read_offer
from kvtransfer.transports.nixl_landing import DRAM, MAX_METADATA_BYTES, NixlOffer, NixlUnavailable
from proto.control import Peer
from proto.errors import SettingsError
from proto.handoff import Located
from proto.ids import BlockId, Epoch, WorkerId
from service.rpc import TlsFiles, serve
from tests.support.device import NONCE, DeviceStore, FakeDriver
from tests.support.handoff import CHOICES, SHARED_LAYOUT, Ear, SharedStore, Store, Tier, make_offer
from tests.support.nixl import FakeAgent

ROOT = Path(__file__).parents[2]
P = Epoch("p")
BLOCK_BYTES = SHARED_LAYOUT.block_bytes
NUM_BLOCKS = 4
ALL = [BlockId(block) for block in range(NUM_BLOCKS)]
PLACES = [Located(block * BLOCK_BYTES) for block in range(NUM_BLOCKS)]
OFFER = make_offer(NUM_BLOCKS, layout=SHARED_LAYOUT)

needs_no_nixl = pytest.mark.skipif(importlib.util.find_spec("nixl") is not None, reason="NIXL is here")
needs_nixl = pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="NIXL is an extra")


@pytest.fixture
def theirs() -> Iterator[SharedStore]:
    store = SharedStore(NUM_BLOCKS, SHARED_LAYOUT)
    store.fill(OFFER)
    yield store
    store.close()


@pytest.fixture
def ours() -> Store:
    return Store(NUM_BLOCKS, SHARED_LAYOUT)


@pytest.fixture
def agent() -> FakeAgent:
    return FakeAgent()


def offered(store: Store, **changes: object) -> bytes:
    offer = read_offer(nixl_offer(FakeAgent("p"), store).detail)
    assert offer is not None
    return bytes(msgpack.packb(astuple(replace(offer, **changes))))  # type: ignore[arg-type]


async def opened(reader: NixlReader, detail: bytes, store: Store, epoch: Epoch = P) -> PeerSource:
    source = await reader.open(detail, epoch, store)
    assert source is not None
    return source


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - ends are noticed in threads
            await asyncio.sleep(0.005)


async def until_given_back(agent: FakeAgent) -> None:
    await eventually(lambda: agent.has_given_back)


async def test_a_batch_of_blocks_is_one_read(agent: FakeAgent, theirs: SharedStore, ours: Store) -> None:
    before = bytes(theirs.mapped)
    reader = NixlReader(agent)
    source = await opened(reader, offered(theirs), ours)
    assert await source.place(PLACES, ALL[::-1], ours) == [True] * NUM_BLOCKS
    assert agent.reads == [1, NUM_BLOCKS], "the nonce, and all blocks at once"
    assert all(ours.read(BlockId(NUM_BLOCKS - 1 - block)) == theirs.read(block) for block in ALL)
    assert bytes(theirs.mapped) == before, "P's memory is only read"
    source.close()
    source.close()
    reader.close()
    await until_given_back(agent)


async def test_what_arrives_for_a_device_is_copied_there(agent: FakeAgent) -> None:
    memory = FakeDriver().allocate(NUM_BLOCKS * BLOCK_BYTES + len(NONCE))
    theirs, ours = DeviceStore(NUM_BLOCKS, SHARED_LAYOUT, memory=memory), DeviceStore(NUM_BLOCKS, SHARED_LAYOUT)
    theirs.fill(OFFER)
    reader = NixlReader(agent)
    source = await opened(reader, offered(theirs), ours)
    assert ours.lane.told == ["enter", "finish", "enter"], "where READs land no step has work; then the nonce is read"
    ours.lane.told.clear()
    assert await source.place(PLACES[:3], ALL[1:], ours) == [True] * 3
    assert ours.lane.told == ["enter", "finish"], "one launch for all, waited for once"
    assert all(ours.read(BlockId(block + 1)) == theirs.read(block) for block in ALL[:3])
    source.close()
    reader.close()
    await until_given_back(agent)


async def test_more_blocks_than_one_read_brings(
    agent: FakeAgent, theirs: SharedStore, ours: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtransfer.transports.nixl_landing.LANDING_BYTES", 3 * BLOCK_BYTES)
    reader = NixlReader(agent)
    source = await opened(reader, offered(theirs), ours)
    assert await source.place(PLACES, ALL, ours) == [True] * NUM_BLOCKS
    assert agent.reads == [1, 3, 1]
    assert all(ours.read(block) == theirs.read(block) for block in ALL)
    source.close()
    reader.close()


async def test_one_peer_serves_all_hand_offs_of_an_incarnation(
    agent: FakeAgent, theirs: SharedStore, ours: Store
) -> None:
    reader, detail = NixlReader(agent), offered(theirs)
    sources = await asyncio.gather(*(opened(reader, detail, ours) for _ in range(3)))
    assert agent.met == ["p"]
    reader.close()
    reader.forget(P)
    for source in sources:
        assert await source.place(PLACES[:1], ALL[:1], ours) == [True], "sources that are open stay good"
        assert agent.parted == []
        source.close()
    await until_given_back(agent)


async def test_places_where_no_block_lies(agent: FakeAgent, theirs: SharedStore, ours: Store) -> None:
    reader = NixlReader(agent)
    source = await opened(reader, offered(theirs), ours)
    payloads = [Located(NUM_BLOCKS * BLOCK_BYTES), b"inline", Located(BLOCK_BYTES), Located(1)]
    assert await source.place(payloads, ALL, ours) == [False, False, True, False]
    assert ours.read(BlockId(2)) == theirs.read(BlockId(1))
    assert set(ours.writes) == {2}
    source.close()
    reader.close()


@pytest.mark.parametrize(
    "changes", [{"nonce": b"another nonce..."}, {"metadata": b"nobody"}, {"num_bytes": NUM_BLOCKS * BLOCK_BYTES}]
)
async def test_memory_that_is_not_what_was_meant_is_not_used(
    agent: FakeAgent, theirs: SharedStore, ours: Store, changes: dict[str, object]
) -> None:
    reader, detail = NixlReader(agent), offered(theirs, **changes)
    assert await reader.open(detail, P, ours) is None
    await until_given_back(agent)
    num_met = len(agent.met)
    assert await reader.open(detail, P, ours) is None
    assert len(agent.met) == num_met, "not tried again at once"
    reader.close()


async def test_a_read_that_fails_ends_the_peer(agent: FakeAgent, theirs: SharedStore, ours: Store) -> None:
    reader, detail = NixlReader(agent), offered(theirs)
    source = await opened(reader, detail, ours)
    agent.fault = "the peer is gone"
    assert await source.place(PLACES, ALL, ours) == [False] * NUM_BLOCKS
    await until_given_back(agent)
    agent.fault = ""
    assert await source.place(PLACES, ALL, ours) == [False] * NUM_BLOCKS
    assert await reader.open(detail, P, ours) is None, "another way is taken"
    assert ours.writes == {}
    source.close()
    reader.close()


async def test_a_late_read_keeps_its_landing_place_and_spoils_no_block(
    agent: FakeAgent, theirs: SharedStore, ours: Store
) -> None:
    reader = NixlReader(agent, stall_s=0.02, idle_s=0.01)
    source = await opened(reader, offered(theirs), ours)
    agent.is_held = True
    assert await source.place(PLACES, ALL, ours) == [False] * NUM_BLOCKS
    source.close()
    ours.fill(make_offer(NUM_BLOCKS, layout=SHARED_LAYOUT))  # the blocks are somebody else's now
    ours.writes.clear()
    await asyncio.sleep(0.05)
    assert len(agent.registered) == 1, "it may still be written"
    assert agent.parted == []
    assert reader.num_peers == 1, "and it counts"
    agent.is_held = False
    await until_given_back(agent)
    await eventually(lambda: reader.num_peers == 0)
    assert ours.writes == {}


async def test_a_peer_that_does_not_answer_is_not_waited_for(
    agent: FakeAgent, theirs: SharedStore, ours: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtransfer.transports.nixl.MEET_S", 0.02)
    agent.is_held = True
    reader = NixlReader(agent, stall_s=0.2)
    assert await reader.open(offered(theirs), P, ours) is None
    agent.is_held = False
    reader.close()
    await until_given_back(agent)


async def test_there_are_so_many_peers_and_no_more(agent: FakeAgent, theirs: SharedStore, ours: Store) -> None:
    reader = NixlReader(agent, max_peers=2)
    details = [offered(theirs, metadata=f"p{number}".encode()) for number in range(4)]
    epochs = [Epoch(f"p{number}") for number in range(4)]
    sources = [await opened(reader, details[number], ours, epochs[number]) for number in range(2)]
    assert await reader.open(details[2], epochs[2], ours) is None, "all are in use"
    sources[1].close()
    sources[0].close()
    await opened(reader, details[2], ours, epochs[2])
    assert agent.met == ["p0", "p1", "p2"]
    await eventually(lambda: agent.parted == ["p1"])
    assert reader.num_peers == 2, "the least recently used one went"
    reader.close()


async def test_a_peer_that_nobody_uses_is_let_go_of(agent: FakeAgent, theirs: SharedStore, ours: Store) -> None:
    reader = NixlReader(agent, idle_s=0.05)
    source = await opened(reader, offered(theirs), ours)
    await asyncio.sleep(0.1)
    assert reader.num_peers == 1
    source.close()
    assert reader.num_peers == 1, "the next hand-off is soon"
    await eventually(lambda: reader.num_peers == 0)
    await until_given_back(agent)


async def test_a_peer_that_comes_back_while_it_is_let_go_of_is_met_again(
    agent: FakeAgent, theirs: SharedStore, ours: Store
) -> None:
    agent.part_s = 0.05
    reader = NixlReader(agent, idle_s=0.02)
    for _ in range(3):
        source = await opened(reader, offered(theirs), ours)
        source.close()
        await eventually(lambda: P not in reader._peers or reader._peers[P]._connection is None)
    assert len(agent.met) == 3
    reader.close()
    await until_given_back(agent)


async def test_a_peer_that_had_to_make_room_comes_back(agent: FakeAgent, theirs: SharedStore, ours: Store) -> None:
    agent.part_s = 0.05
    reader = NixlReader(agent, max_peers=1)
    for name in ("p0", "p1", "p0"):
        source = await opened(reader, offered(theirs, metadata=name.encode()), ours, Epoch(name))
        source.close()
    assert agent.met == ["p0", "p1", "p0"]
    reader.close()
    await until_given_back(agent)


@pytest.mark.parametrize(
    "change",
    [
        {"metadata": b""},
        {"metadata": bytes(MAX_METADATA_BYTES + 1)},
        {"metadata": "text"},
        {"address": -1},
        {"address": (1 << 64) - 4},
        {"num_bytes": 3},
        {"num_bytes": True},
        {"kind": "FILE"},
        {"kind": []},
        {"device": 1 << 16},
        {"nonce": b""},
        {"nonce": bytes(65)},
    ],
)
def test_malformed_details_are_not_understood(change: dict[str, object]) -> None:
    good = NixlOffer(b"metadata", 4096, 4112, DRAM, 0, bytes(16))
    assert read_offer(msgpack.packb(astuple(good))) == good
    assert read_offer(msgpack.packb([*astuple(good), "of a newer version"])) == good
    assert read_offer(msgpack.packb(astuple(replace(good, **change)))) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("detail", [b"", b"\xc1", *(msgpack.packb(each) for each in ([], 7, [b"metadata", 1, 2]))])
def test_what_is_no_detail_is_not_understood(detail: bytes) -> None:
    assert read_offer(detail) is None


def test_memory_that_cannot_be_shared(agent: FakeAgent, theirs: SharedStore, ours: Store) -> None:
    with pytest.raises(NixlUnavailable, match="neither a file nor a GPU's"):
        nixl_offer(agent, ours)
    agent.fault = "no backend for it"
    with pytest.raises(NixlUnavailable, match="no backend for it"):
        nixl_offer(agent, theirs)


@needs_no_nixl
def test_without_the_library_there_is_another_way_or_an_error_that_says_how_to_get_it(theirs: SharedStore) -> None:
    assert [reader.name for reader in payload_readers(("nixl", "grpc"), Epoch("d"))] == ["grpc"]
    assert [offer.name for offer in transport_offers(("nixl", "grpc"), theirs)] == ["grpc"]
    with pytest.raises(SettingsError, match=r"pip install 'tandem-serve\[nixl\]'.*allow grpc"):
        payload_readers(("nixl",), Epoch("d"))
    with pytest.raises(SettingsError, match=r"pip install 'tandem-serve\[nixl\]'.*allow grpc"):
        transport_offers(("nixl",), theirs)


def test_it_has_to_be_named_and_beside_tls_allowed() -> None:
    tls = TlsFiles(b"", b"", b"", None)
    assert "nixl" not in allowed_names(("auto",), tls)
    assert allowed_names(("nixl", "grpc")) == ("nixl", "grpc")
    with pytest.raises(SettingsError, match="nixl does not encrypt"):
        allowed_names(("nixl", "grpc"), tls)
    assert allowed_names(("nixl", "grpc"), tls, nccl_beside_tls=True) == ("nixl", "grpc")


async def test_blocks_change_owner(agent: FakeAgent, theirs: SharedStore, ours: Store) -> None:
    network, ear, tier, reader = MemoryNetwork(), Ear(), Tier(ours), NixlReader(agent)

    async def on_link(link: Link) -> None:
        await ReceiveSession(link, ours, tier, FenceTable(Epoch("d"), 9.0), readers=(reader,)).run()

    network.serve("d", on_link)
    transports = (nixl_offer(FakeAgent("p"), theirs), *inline_offers("grpc"))
    offer = make_offer(NUM_BLOCKS, layout=SHARED_LAYOUT, transports=transports)
    session = SendSession(offer, theirs, network.connect, Peer(WorkerId("d"), Epoch("d"), "d"), ear)
    session.blocks_ready(0, ALL)
    session.seal(NUM_BLOCKS, SHARED_LAYOUT.block_size, CHOICES)
    await session.run()
    await network.drain()
    assert ear.transport == "nixl"
    assert ear.told == ["granted", "adopted", "released"]
    assert tier.holds(offer)
    reader.close()
    await until_given_back(agent)


async def test_a_read_that_fails_in_a_hand_off_frees_the_reservation(
    agent: FakeAgent, theirs: SharedStore, ours: Store
) -> None:
    network, ear, tier, reader = MemoryNetwork(), Ear(), Tier(ours), NixlReader(agent)

    async def on_link(link: Link) -> None:
        await ReceiveSession(link, ours, tier, FenceTable(Epoch("d"), 9.0), readers=(reader,)).run()

    network.serve("d", on_link)
    offer = make_offer(2, layout=SHARED_LAYOUT, transports=(nixl_offer(FakeAgent("p"), theirs),))
    session = SendSession(offer, theirs, network.connect, Peer(WorkerId("d"), Epoch("d"), "d"), ear)
    running = asyncio.create_task(session.run())
    await ear.until("granted")
    agent.fault = "the peer is gone"
    session.blocks_ready(0, ALL[:1])
    await tier.is_over.wait()
    assert tier.freed_with == [(0, "corrupt")]
    session.withdraw("enough")
    await running
    await network.drain()
    reader.close()
    await until_given_back(agent)


async def start(*arguments: str, over: str = "all") -> asyncio.subprocess.Process:
    """``over``: UCX_TLS, the networks that UCX may use."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.nixl_pair", *arguments),
        cwd=ROOT,
        env={**os.environ, "UCX_TLS": over},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )


async def line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await process.stdout.readline()).decode().strip()


@needs_nixl
async def test_between_two_processes() -> None:
    tier = Tier(Store(24, SHARED_LAYOUT))
    readers = payload_readers(("nixl", "grpc"), Epoch("d"))
    assert [reader.name for reader in readers] == ["nixl", "grpc"]

    async def on_link(link: Link) -> None:
        await ReceiveSession(link, tier.store, tier, FenceTable(Epoch("d"), 100.0), readers=readers).run()

    server, port = await serve("127.0.0.1", 0, [grpc_link.handoff_handler(on_link)])
    sender = await start("send", f"127.0.0.1:{port}")
    assert (await line(sender)).split() == ["nixl", "granted", "adopted", "released"]
    assert tier.told == ["reserve", "sealed", "adopted"]
    assert tier.holds(make_offer(24, layout=SHARED_LAYOUT))
    assert sender.stdin is not None
    sender.stdin.close()
    assert await sender.wait() == 0
    for reader in readers:
        reader.close()
    await server.stop(None)


@needs_nixl
@pytest.mark.parametrize(
    ("over", "end"),
    [("all", signal.SIGKILL), ("tcp", signal.SIGKILL), ("tcp", signal.SIGSTOP)],
)
async def test_a_prefill_worker_that_goes_in_the_middle_of_reads(over: str, end: signal.Signals) -> None:
    """One that was stopped goes on later, and what it then still sends spoils no block."""
    holding = await start("hold", over=over)
    copying = await start("copy", await line(holding), over=over)
    try:
        assert await line(copying) == "copying"
        await asyncio.sleep(0.3)
        holding.send_signal(end)
        async with asyncio.timeout(30):
            assert await line(copying) == "failed"
        if end == signal.SIGSTOP:
            holding.send_signal(signal.SIGCONT)
        async with asyncio.timeout(30):
            assert await line(copying) == "untouched"
            assert await copying.wait() == 0
    finally:
        for process in (holding, copying):
            if process.returncode is None:
                process.kill()
                await process.wait()


@needs_nixl
async def test_a_nonce_that_is_not_there_is_noticed() -> None:
    """The memory is another one, at the right place of the right process."""
    holding = await start("hold")
    offer = read_offer(bytes.fromhex(await line(holding)))
    assert offer is not None
    [reader] = payload_readers(("nixl",), Epoch("d"))
    wrong = msgpack.packb(astuple(replace(offer, nonce=b"another nonce...")))
    store = Store(NUM_BLOCKS, SHARED_LAYOUT)
    assert await reader.open(wrong, P, store) is None
    reader.close()
    [reader] = payload_readers(("nixl",), Epoch("d"))
    good = await reader.open(msgpack.packb(astuple(offer)), P, store)
    reader.close()
    holding.kill()
    await holding.wait()
    assert good is not None, "with the right one all is well"
    good.close()
