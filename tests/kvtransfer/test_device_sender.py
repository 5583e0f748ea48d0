"""A prefill worker on a device that sends its blocks inside frames: they are read beside the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from kvtransfer import transports
from kvtransfer.fences import FenceTable
from kvtransfer.session import Connect, ReceiveSession, SendSession
from kvtransfer.tasks import off_loop
from kvtransfer.transport import Link
from kvtransfer.transports.memory import MemoryNetwork, pair
from proto.control import Peer
from proto.errors import DeviceLost
from proto.handoff import Frame, Grant, Nack, Seal
from proto.ids import BlockId, Epoch, WorkerId
from proto.layout import KvLayout
from tests.support.device import DeviceStore
from tests.support.handoff import CHOICES, Ear, Store, Tier, content, make_offer, make_seal

BIG = KvLayout(num_layers=2, block_size=16, kv_heads=8, head_dim=64, dtype="float32", model_digest="big")
NUM_BLOCKS = 11
PEER = Peer(WorkerId("d"), Epoch("d"), "d")


@dataclass
class Watched:
    """What is read of a store, by block and thread, in ``trips`` of so many. Until ``may_read`` is set, reads wait."""

    reads: list[tuple[BlockId, int]] = field(default_factory=list)
    may_read: threading.Event = field(default_factory=threading.Event)
    is_reading: threading.Event = field(default_factory=threading.Event)
    trips: list[int] = field(default_factory=list)


class WatchedStore(DeviceStore):
    def __init__(self, watched: Watched) -> None:
        super().__init__(NUM_BLOCKS, BIG)
        self.watched = watched

    def read(self, block: BlockId) -> memoryview:
        self.watched.reads.append((block, threading.get_ident()))
        self.watched.is_reading.set()
        assert self.watched.may_read.wait(20)
        return super().read(block)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> WatchedStore:
    """Four blocks a trip."""
    watched = Watched()

    async def counted(work: Callable[[], object], num_bytes: int) -> object:
        watched.trips.append(num_bytes // BIG.block_bytes)
        return await off_loop(work, num_bytes)

    monkeypatch.setattr(transports, "off_loop", counted)
    monkeypatch.setattr(transports.CopiedWriter, "batch_bytes", 4 * BIG.block_bytes)
    return WatchedStore(watched)


@pytest.fixture
async def d() -> AsyncIterator[tuple[Link, Connect]]:
    """D's end of a link, and what makes P's."""
    near, far = pair()

    async def connect(peer: Peer) -> Link:
        return near

    yield far, connect
    await far.close()


def start(store: DeviceStore, connect: Connect, ear: Ear) -> tuple[SendSession, asyncio.Task[None]]:
    offer = make_offer(NUM_BLOCKS, layout=BIG)
    session = SendSession(offer, store, connect, PEER, ear)
    session.blocks_ready(0, store.fill(offer))
    session.seal(NUM_BLOCKS, make_seal(offer, layout=BIG).num_tokens_last, CHOICES)
    return session, asyncio.create_task(session.run())


async def reading(store: WatchedStore, d: tuple[Link, Connect], ear: Ear) -> tuple[SendSession, asyncio.Task[None]]:
    """Started and granted; its first blocks are being read."""
    link, connect = d
    session, running = start(store, connect, ear)
    offer = await link.receive()
    await link.send(Grant(offer.fence, 0, "memory"))
    assert await asyncio.to_thread(store.watched.is_reading.wait, 20)
    return session, running


async def test_the_event_loop_reads_no_block(store: WatchedStore) -> None:
    network, tier, ear = MemoryNetwork(), Tier(Store(NUM_BLOCKS, BIG)), Ear()

    async def on_link(link: Link) -> None:
        await ReceiveSession(link, tier.store, tier, FenceTable(Epoch("d"), 9.0)).run()

    network.serve("d", on_link)
    store.watched.may_read.set()
    _, running = start(store, network.connect, ear)
    await running
    await network.drain()
    assert ear.told == ["granted", "adopted", "released"]
    assert tier.holds(make_offer(NUM_BLOCKS, layout=BIG))
    blocks, threads = zip(*store.watched.reads, strict=True)
    assert blocks == tuple(range(NUM_BLOCKS)), "each once, in order"
    assert threading.get_ident() not in threads


async def test_several_are_read_at_a_time_in_order_and_one_that_is_wanted_again_is_read_again(
    store: WatchedStore, d: tuple[Link, Connect]
) -> None:
    link, connect = d
    store.watched.may_read.set()
    session, running = start(store, connect, Ear())
    offer = await link.receive()
    await link.send(Grant(offer.fence, 2, "memory"))
    frames = []
    while not isinstance(message := await link.receive(), Seal):
        assert isinstance(message, Frame)
        frames.append(message)
    assert [frame.index for frame in frames] == list(range(2, NUM_BLOCKS)), "the first two are there"
    await link.send(Nack(offer.fence, 5))
    again = await link.receive()
    assert isinstance(again, Frame)
    hashes = make_offer(NUM_BLOCKS, layout=BIG).hashes
    assert again.index == 5
    for frame in (*frames, again):
        assert bytes(frame.payload) == content(hashes[frame.index], BIG.block_bytes)  # type: ignore[arg-type]
    assert [block for block, _ in store.watched.reads] == [*range(2, NUM_BLOCKS), 5]
    assert store.watched.trips == [4, 4, 1, 1]
    session.withdraw("enough")
    await running


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_a_release_waits_for_the_read_that_is_under_way(
    is_cancelled: bool, store: WatchedStore, d: tuple[Link, Connect]
) -> None:
    ear = Ear()
    session, running = await reading(store, d, ear)
    if is_cancelled:
        running.cancel()
    else:
        session.withdraw("aborted")
    await asyncio.sleep(0.05)
    assert "released" not in ear.told, "the block is still being read"
    store.watched.may_read.set()
    await asyncio.wait((running,))
    assert running.cancelled() == is_cancelled
    assert ear.told[-1] == "released"
    num_reads = len(store.watched.reads)
    assert num_reads == 4, "what was begun, and no more"


async def test_a_device_that_is_lost_while_blocks_are_read_is_our_own_fault(
    store: WatchedStore, d: tuple[Link, Connect]
) -> None:
    ear = Ear()
    _, running = await reading(store, d, ear)
    store.lane.lose_device()
    store.watched.may_read.set()
    with pytest.raises(DeviceLost):
        await running
    assert ear.told[-1] == "released"
