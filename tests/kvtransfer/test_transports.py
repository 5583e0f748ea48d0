"""Links: what is promised of each, within a process and over gRPC on the loopback interface."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import pytest

from kvtransfer.fences import FenceTable
from kvtransfer.session import ReceiveSession, SendSession
from kvtransfer.transport import Link, LinkLost
from kvtransfer.transports import SHM, InlineReader, choose, inline_offers
from kvtransfer.transports import grpc as grpc_link
from kvtransfer.transports.choice import allowed_names, payload_readers, transport_offers
from kvtransfer.transports.memory import Faults, MemoryNetwork, pair
from proto.control import Peer
from proto.errors import RemoteProtocolError, SettingsError
from proto.handoff import Ack, Frame, Grant, Located, Nack, Offer, Withdraw
from proto.ids import BlockId, Epoch, WorkerId
from proto.layout import KvLayout, MemoryExport
from service.rpc import channel, serve
from tests.support.handoff import (
    BLOCK,
    CHOICES,
    LAYOUT,
    Ear,
    Store,
    Tier,
    make_fence,
    make_frame,
    make_offer,
    make_seal,
)

FENCE = make_fence()


class TestMemory:
    async def test_messages_arrive_in_order(self) -> None:
        ours, theirs = pair()
        for upto in range(5):
            await ours.send(Ack(FENCE, upto))
        assert [await theirs.receive() for _ in range(5)] == [Ack(FENCE, upto) for upto in range(5)]

    async def test_a_slow_reader_makes_the_writer_wait(self) -> None:
        ours, theirs = pair(2)
        await ours.send(Ack(FENCE, 0))
        await ours.send(Ack(FENCE, 1))
        third = asyncio.create_task(ours.send(Ack(FENCE, 2)))
        await asyncio.sleep(0)
        assert not third.done()
        await theirs.receive()
        await third

    async def test_what_was_sent_before_the_close_still_arrives(self) -> None:
        ours, theirs = pair()
        await ours.send(Ack(FENCE, 1))
        await ours.close()
        await ours.close()
        assert await theirs.receive() == Ack(FENCE, 1)
        with pytest.raises(LinkLost):
            await theirs.receive()
        with pytest.raises(LinkLost):
            await theirs.send(Ack(FENCE, 2))

    async def test_closing_wakes_those_who_wait(self) -> None:
        ours, theirs = pair(1)
        await ours.send(Ack(FENCE, 1))
        waiting = [asyncio.create_task(ours.receive()), asyncio.create_task(ours.send(Ack(FENCE, 2)))]
        await asyncio.sleep(0)
        await ours.close()
        assert all(isinstance(end, LinkLost) for end in await asyncio.gather(*waiting, return_exceptions=True))
        assert await theirs.receive() == Ack(FENCE, 1)

    def test_faults_do_each_of_what_they_say(self) -> None:
        rng = random.Random(1)
        frame, offer = make_frame(make_offer(1), 0), make_offer(1)
        assert Faults(rng)(frame) == [frame]
        assert Faults(rng, drop=1.0)(frame) == []
        assert Faults(rng, duplicate=1.0)(offer) == [offer, offer]
        (damaged,) = Faults(rng, corrupt=1.0)(frame)
        assert isinstance(damaged, Frame)
        assert (damaged.index, damaged.checksum) == (0, frame.checksum)
        assert damaged.payload != frame.payload
        assert Faults(rng, corrupt=1.0)(offer) == [offer]

    def test_a_delayed_message_comes_behind_a_newer_one(self) -> None:
        faults = Faults(random.Random(3), delay=1.0)
        assert faults(Ack(FENCE, 1)) == ()
        faults.heal()
        arrived: list[object] = []
        while Ack(FENCE, 1) not in arrived:
            arrived += faults(Ack(FENCE, 2))
        assert arrived[0] == Ack(FENCE, 2)

    async def test_nobody_at_an_address(self) -> None:
        with pytest.raises(LinkLost):
            await MemoryNetwork().connect(Peer(WorkerId("d"), Epoch("d"), "d"))


OnLink = Callable[[Link], Awaitable[None]]
Serve = Callable[[OnLink], Awaitable[str]]


@pytest.fixture
async def listen() -> AsyncIterator[Serve]:
    servers: list[grpc.aio.Server] = []

    async def start(on_link: OnLink) -> str:
        server, port = await serve("127.0.0.1", 0, [grpc_link.handoff_handler(on_link)])
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        await server.stop(None)


class Guest:
    """The server's end of one link, handed to the test."""

    def __init__(self) -> None:
        self.link: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        self.may_end = asyncio.Event()

    async def on_link(self, link: Link) -> None:
        self.link.set_result(link)
        await self.may_end.wait()


class TestGrpc:
    async def test_messages_and_payloads_pass_both_ways(self, listen: Serve) -> None:
        guest = Guest()
        ours = await grpc_link.connect(await listen(guest.on_link))
        offer = make_offer(3)
        await ours.send(offer)
        theirs = await guest.link
        assert await theirs.receive() == offer
        await theirs.send(Grant(FENCE, 1, "grpc"))
        assert await ours.receive() == Grant(FENCE, 1, "grpc")
        store = Store(3)
        store.fill(offer)
        frame = make_frame(offer, 2)
        await ours.send(Frame(FENCE, 2, frame.checksum, store.read(BlockId(2))))
        arrived = await theirs.receive()
        assert isinstance(arrived, Frame)
        assert not isinstance(arrived.payload, Located)
        assert (arrived.checksum, bytes(arrived.payload)) == (frame.checksum, frame.payload)
        guest.may_end.set()
        with pytest.raises(LinkLost):
            await ours.receive()
        await ours.close()

    async def test_last_words_are_read(self, listen: Serve) -> None:
        guest = Guest()
        ours = await grpc_link.connect(await listen(guest.on_link))
        reading = asyncio.create_task(ours.receive())
        await ours.send(make_offer(1))
        theirs = await guest.link
        await ours.send(Withdraw(FENCE, "bye"))
        closing = asyncio.create_task(ours.close())
        assert isinstance(await theirs.receive(), Offer)
        assert await theirs.receive() == Withdraw(FENCE, "bye")
        with pytest.raises(LinkLost):
            await theirs.receive()
        guest.may_end.set()
        await closing
        with pytest.raises(LinkLost):
            await reading
        with pytest.raises(LinkLost):
            await ours.send(Ack(FENCE, 1))

    async def test_the_server_closing_wakes_its_own_reader(self, listen: Serve) -> None:
        guest = Guest()
        ours = await grpc_link.connect(await listen(guest.on_link))
        await ours.send(make_offer(1))
        theirs = await guest.link
        await theirs.receive()
        waiting = asyncio.create_task(theirs.receive())
        await asyncio.sleep(0)
        await theirs.close()
        with pytest.raises(LinkLost):
            await waiting
        guest.may_end.set()
        with pytest.raises(LinkLost):
            await ours.receive()
        await ours.close()

    async def test_a_reader_that_is_cancelled_loses_no_message(self, listen: Serve) -> None:
        guest = Guest()
        ours = await grpc_link.connect(await listen(guest.on_link))
        waiting = asyncio.create_task(ours.receive())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        theirs = await guest.link
        await theirs.send(Nack(FENCE, 4))
        assert await ours.receive() == Nack(FENCE, 4)
        guest.may_end.set()
        await ours.close()

    async def test_small_messages_that_wait_leave_together(self, listen: Serve) -> None:
        guest = Guest()
        ours = await grpc_link.connect(await listen(guest.on_link))
        await asyncio.gather(*(ours.send(Ack(FENCE, upto)) for upto in range(200)))
        theirs = await guest.link
        assert [await theirs.receive() for _ in range(200)] == [Ack(FENCE, upto) for upto in range(200)]
        guest.may_end.set()
        await ours.close()

    async def test_a_peer_that_does_not_read_makes_the_writer_wait(self, listen: Serve) -> None:
        guest = Guest()
        ours = await grpc_link.connect(await listen(guest.on_link))
        await ours.send(make_offer(1))
        theirs = await guest.link
        big = Frame(FENCE, 0, 1, bytes(1 << 20))
        num_sent = 0

        async def fill() -> None:
            nonlocal num_sent
            while num_sent < 64:
                await ours.send(big)
                num_sent += 1

        filling = asyncio.create_task(fill())
        done, _ = await asyncio.wait({filling}, timeout=0.3)
        assert not done
        assert isinstance(await theirs.receive(), Offer)
        for _ in range(64):
            assert isinstance(await theirs.receive(), Frame)
        await filling
        guest.may_end.set()
        await ours.close()

    def test_batches(self) -> None:
        small, large = b"\x00" * 10, b"\x01" * (grpc_link.MAX_BATCH_BYTES + 1)
        waiting = deque([small, small, large, small])
        packed = []
        while waiting:
            packed.append(grpc_link._packed(waiting))
        assert packed[1] is large
        assert [[bytes(each) for each in grpc_link._unpacked(data)] for data in packed] == [
            [small, small],
            [large],
            [small],
        ]

    @pytest.mark.parametrize("data", [b"\x02\x00\x00", b"\x02\x00\x00\x00\x05abc"])
    def test_malformed_batches(self, data: bytes) -> None:
        with pytest.raises(RemoteProtocolError):
            grpc_link._unpacked(data)

    async def test_nobody_listens(self) -> None:
        with pytest.raises(LinkLost):
            await grpc_link.connect("127.0.0.1:1")

    async def test_garbage_is_the_peers_fault(self, listen: Serve) -> None:
        guest = Guest()
        async with channel(await listen(guest.on_link)) as conduit:
            call = conduit.stream_stream(f"/{grpc_link.SERVICE}/{grpc_link.METHOD}")()
            await call.write(b"\x07nonsense")
            theirs = await guest.link
            with pytest.raises(RemoteProtocolError):
                await theirs.receive()
            guest.may_end.set()
            call.cancel()

    async def test_an_error_of_ours_ends_the_stream(self, listen: Serve, caplog: pytest.LogCaptureFixture) -> None:
        async def on_link(link: Link) -> None:
            raise RuntimeError("a bug")

        ours = await grpc_link.connect(await listen(on_link))
        with pytest.raises(LinkLost):
            await ours.receive()
        await ours.close()
        assert "a bug" in caplog.text


class Worker:
    """A decode worker behind gRPC."""

    def __init__(self, layout: KvLayout = LAYOUT, num_blocks: int = 64) -> None:
        self.tier = Tier(Store(num_blocks, layout))
        self.fences = FenceTable(Epoch("d"), 100.0)
        self.sessions: list[ReceiveSession] = []
        self.is_done = asyncio.Event()

    async def on_link(self, link: Link) -> None:
        session = ReceiveSession(link, self.tier.store, self.tier, self.fences)
        self.sessions.append(session)
        await session.run()
        self.is_done.set()


async def connect(peer: Peer) -> Link:
    return await grpc_link.connect(peer.address)


class TestHandoffOverGrpc:
    async def test_blocks_change_owner(self, listen: Serve) -> None:
        layout = KvLayout(num_layers=2, block_size=16, kv_heads=4, head_dim=32, dtype="float32", model_digest="m")
        worker = Worker(layout)
        peer = Peer(WorkerId("d"), Epoch("d"), await listen(worker.on_link))
        store, ear = Store(32, layout), Ear()
        offer = make_offer(32, layout=layout, transports=("shm", "grpc"))
        session = SendSession(offer, store, connect, peer, ear)
        session.blocks_ready(0, store.fill(offer))
        session.seal(32, 16, CHOICES)
        await session.run()
        await worker.is_done.wait()
        assert ear.transport == "grpc"
        assert ear.told == ["granted", "adopted", "released"]
        assert worker.tier.told == ["reserve", "sealed", "adopted"]
        assert worker.tier.holds(offer)

    async def test_many_at_once_share_a_connection(self, listen: Serve) -> None:
        worker, other = Worker(), Worker()
        other.tier.first_block = 32
        peers = [Peer(WorkerId("d"), Epoch("d"), await listen(each.on_link)) for each in (worker, other)]
        offers = [make_offer(8, fence=make_fence(request=f"r.{n}"), transports=("grpc",)) for n in range(2)]

        async def hand_over(offer: Offer, peer: Peer) -> Ear:
            store, ear = Store(8), Ear()
            session = SendSession(offer, store, connect, peer, ear)
            session.blocks_ready(0, store.fill(offer))
            session.seal(8, 4, CHOICES)
            await session.run()
            return ear

        ears = await asyncio.gather(*map(hand_over, offers, peers))
        assert all(ear.told == ["granted", "adopted", "released"] for ear in ears)
        assert worker.tier.holds(offers[0])
        assert other.tier.holds(offers[1])

    async def test_a_sender_that_dies_after_its_seal_is_not_missed(self, listen: Serve) -> None:
        worker = Worker()
        worker.tier.may_adopt = asyncio.Event()
        address, offer = await listen(worker.on_link), make_offer(2, transports=("grpc",))
        conduit = channel(address)
        call = conduit.stream_stream(f"/{grpc_link.SERVICE}/{grpc_link.METHOD}")()
        link = grpc_link._ClientLink(conduit, call)
        await link.send(offer)
        assert isinstance(await link.receive(), Grant)
        for message in (make_frame(offer, 0), make_frame(offer, 1), make_seal(offer)):
            await link.send(message)
        while not isinstance(message := await link.receive(), Ack) or message.upto < 2:
            pass
        call.cancel()  # no farewell: its process is gone
        await conduit.close()
        worker.tier.may_adopt.set()
        await worker.is_done.wait()
        assert worker.tier.told == ["reserve", "sealed", "adopted"]

    async def test_a_sender_that_dies_before_its_seal_is_cleaned_up_after(self, listen: Serve) -> None:
        worker = Worker()
        address, offer = await listen(worker.on_link), make_offer(2, transports=("grpc",))
        conduit = channel(address)
        call = conduit.stream_stream(f"/{grpc_link.SERVICE}/{grpc_link.METHOD}")()
        link = grpc_link._ClientLink(conduit, call)
        await link.send(offer)
        assert isinstance(await link.receive(), Grant)
        call.cancel()
        await conduit.close()
        await worker.is_done.wait()
        assert worker.tier.freed_with == [(0, "peer_lost")]

    async def test_a_decode_worker_that_stops_leaves_the_blocks_held(self) -> None:
        worker, ear, store = Worker(), Ear(), Store(4)
        server, port = await serve("127.0.0.1", 0, [grpc_link.handoff_handler(worker.on_link)])
        offer = make_offer(4, transports=("grpc",))
        session = SendSession(offer, store, connect, Peer(WorkerId("d"), Epoch("d"), f"127.0.0.1:{port}"), ear)
        running = asyncio.create_task(session.run())
        await ear.until("granted")
        await server.stop(None)
        await ear.until("held")
        session.withdraw("nobody else")
        await running
        await worker.is_done.wait()
        assert ear.told == ["granted", "held", "released"]
        assert worker.tier.told == ["reserve", "freed"]


class Exporting(Store):
    def export(self) -> MemoryExport | None:
        return MemoryExport(1, 2, 300, 200, b"nonce")


class TestChoice:
    def test_auto_is_the_best_first(self) -> None:
        assert allowed_names(("auto",)) == ("shm", "cuda_ipc", "grpc")
        assert allowed_names(("grpc", "auto")) == ("grpc", "shm", "cuda_ipc")
        assert allowed_names(("nccl", "auto")) == ("nccl", "shm", "cuda_ipc", "grpc")

    @pytest.mark.parametrize("setting", [(), ("rdma",)])
    def test_what_is_not_there_cannot_be_allowed(self, setting: tuple[str, ...]) -> None:
        with pytest.raises(SettingsError):
            allowed_names(setting)

    def test_memory_is_offered_where_it_can_be_shared(self) -> None:
        assert [each.name for each in transport_offers(("auto",), Exporting(1))] == ["shm", "grpc"]
        assert [each.name for each in transport_offers(("auto",), Store(1))] == ["grpc"]
        with pytest.raises(SettingsError, match="allow grpc"):
            transport_offers(("shm",), Store(1))

    async def test_the_first_offered_that_is_usable_is_chosen(self) -> None:
        offer = make_offer(1, transports=("shm", "memory", "grpc"))
        chosen = await choose(
            offer, payload_readers(("auto",), Epoch("d")), Store(1)
        )  # shm's detail is empty: it does not work
        assert chosen is not None
        assert chosen[0] == "grpc"
        assert await choose(offer, payload_readers(("shm",), Epoch("d")), Store(1)) is None
        assert inline_offers("grpc", "memory")[1].name == "memory"
        assert SHM in {reader.name for reader in payload_readers(("auto",), Epoch("d"))}

    async def test_a_place_is_no_payload_inside_the_frame(self) -> None:
        store = Store(2)
        source = await InlineReader("grpc").open(b"", Epoch("p"), store)
        right = bytes(range(BLOCK))
        assert await source.place([Located(0), right], [BlockId(0), BlockId(1)], store) == [False, True]
        assert store.writes == {1: 1}
        assert bytes(store.read(BlockId(1))) == right
        source.close()
