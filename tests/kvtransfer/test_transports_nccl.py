"""NCCL's transport over Gloo: two real processes, and within one what is hard to bring about between two."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import grpc.aio
import msgpack
import pytest
from torch import Tensor

from kvtransfer import fences
from kvtransfer.fences import FenceTable
from kvtransfer.session import ReceiveSession
from kvtransfer.transport import Link
from kvtransfer.transports import grpc as grpc_link
from kvtransfer.transports import nccl, pairs, ring
from kvtransfer.transports.choice import allowed_names, payload_readers, transport_offers
from kvtransfer.transports.device import PeerSource
from kvtransfer.transports.door import NcclDoor
from kvtransfer.transports.nccl import NcclOffer, NcclReader, nccl_offer, read_offer
from kvtransfer.transports.pairs import Fetch, FetchNonce, Join, Opened, Refused
from kvtransfer.transports.ring import Group, Meeting
from proto.errors import RemoteProtocolError, SettingsError
from proto.handoff import Located
from proto.ids import BlockId, Epoch
from proto.layout import KvLayout
from service.rpc import TlsFiles, channel, serve
from tests.support.device import DeviceStore, gloo_group
from tests.support.handoff import SHARED_LAYOUT, Store, Tier, make_offer

ROOT = Path(__file__).parents[2]
P, D = Epoch("p"), Epoch("d")
BLOCK_BYTES = SHARED_LAYOUT.block_bytes
NUM_BLOCKS = 12


@pytest.fixture(autouse=True)
def small_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks in a message: a few blocks go round the ring more than once."""
    monkeypatch.setattr(ring, "RING_BYTES", 8 * BLOCK_BYTES)


class Prefill:
    """P's side within this process: memory, and a door to it."""

    def __init__(self, store: Store, *, epoch: Epoch = P, max_pairs: int = 8) -> None:
        self.store = store
        self.refusals = fences.Refusals()
        self.door = NcclDoor(epoch, lambda: store, self.refusals, groups=gloo_group, max_pairs=max_pairs)
        self.address = ""

    def detail(self) -> bytes:
        device = self.store.on_device()
        assert device is not None
        return nccl_offer(device, self.store.layout, self.address).detail


@asynccontextmanager
async def serving(prefill: Prefill) -> AsyncIterator[Prefill]:
    server, port = await serve("127.0.0.1", 0, [prefill.door.handler()])
    prefill.address = f"127.0.0.1:{port}"
    try:
        yield prefill
    finally:
        await server.stop(None)


@pytest.fixture
async def prefill() -> AsyncIterator[Prefill]:
    store = DeviceStore(NUM_BLOCKS, SHARED_LAYOUT)
    store.fill(make_offer(NUM_BLOCKS, layout=SHARED_LAYOUT))
    async with serving(Prefill(store)) as prefill:
        yield prefill


@pytest.fixture
async def reader() -> AsyncIterator[NcclReader]:
    reader = NcclReader(D, groups=gloo_group)
    yield reader
    reader.close()


@pytest.fixture
def ours() -> DeviceStore:
    return DeviceStore(NUM_BLOCKS, SHARED_LAYOUT)


async def place(source: PeerSource, theirs: list[int], blocks: list[int], store: Store) -> list[bool]:
    payloads = [Located(block * BLOCK_BYTES) for block in theirs]
    return await source.place(payloads, list(map(BlockId, blocks)), store)


async def opened(reader: NcclReader, prefill: Prefill, store: Store, epoch: Epoch = P) -> PeerSource:
    source = await reader.open(prefill.detail(), epoch, store)
    assert source is not None
    return source


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - ends are noticed in threads
            await asyncio.sleep(0.01)


async def test_what_is_asked_for_arrives(prefill: Prefill, reader: NcclReader, ours: DeviceStore) -> None:
    """More blocks than the ring holds, in any order."""
    source = await opened(reader, prefill, ours)
    theirs = [11, 3, 0, 7, 1, 2, 10, 9, 8, 4, 5, 6]
    assert await place(source, theirs, list(range(12)), ours) == [True] * 12
    assert all(ours.read(BlockId(to)) == prefill.store.read(BlockId(at)) for to, at in enumerate(theirs))
    assert await place(source, [2], [0], ours) == [True]
    assert ours.read(BlockId(0)) == prefill.store.read(BlockId(2))
    source.close()
    source.close()


async def test_hand_offs_of_one_pair_share_its_communicator(
    prefill: Prefill, reader: NcclReader, ours: DeviceStore
) -> None:
    sources = await asyncio.gather(*(opened(reader, prefill, ours) for _ in range(3)))
    assert reader.num_pairs == prefill.door.num_pairs == 1
    done = await asyncio.gather(*(place(each, [n, n + 3], [n, n + 3], ours) for n, each in enumerate(sources)))
    assert done == [[True, True]] * 3
    assert all(ours.read(BlockId(n)) == prefill.store.read(BlockId(n)) for n in range(6))
    for source in sources:
        source.close()
    assert reader.num_pairs == 1, "kept for the next"


def test_what_messages_land_in_is_no_memory_of_the_steps(ours: DeviceStore) -> None:
    """Taken beside the steps, and nothing that was queued before still uses it."""
    group = _Silent()
    end = ring.Ring(group, ring.P_RANK, ours.blocks, 4, BLOCK_BYTES)
    assert ours.lane.told == ["enter", "finish"]
    end.send([BlockId(0)])
    ours.lane.told.clear()
    end.receive_bytes(16)
    assert ours.lane.told == ["enter", "finish", "enter", "enter", "enter"]
    assert [each.numel() for each in group.messages] == [BLOCK_BYTES, 16]


async def test_places_where_no_block_lies_are_not_asked_for(
    prefill: Prefill, reader: NcclReader, ours: DeviceStore
) -> None:
    source = await opened(reader, prefill, ours)
    assert await place(source, [NUM_BLOCKS, 1], [0, 1], ours) == [False, True]
    assert ours.read(BlockId(1)) == prefill.store.read(BlockId(1))
    assert not any(ours.read(BlockId(0)))
    source.close()


class TestNotUsed:
    """What D does not choose: None, and nothing is left behind."""

    async def test_a_worker_on_a_cpu(self, prefill: Prefill, reader: NcclReader) -> None:
        assert await reader.open(prefill.detail(), P, Store(4, SHARED_LAYOUT)) is None
        assert prefill.door.num_pairs == 0

    async def test_another_process_at_the_address(
        self, prefill: Prefill, reader: NcclReader, ours: DeviceStore
    ) -> None:
        assert await reader.open(prefill.detail(), Epoch("p of yesterday"), ours) is None
        assert (reader.num_pairs, prefill.door.num_pairs) == (0, 0)

    async def test_another_memory_than_was_offered(
        self, prefill: Prefill, reader: NcclReader, ours: DeviceStore
    ) -> None:
        offer = NcclOffer(prefill.address, NUM_BLOCKS, b"another nonce...")
        assert await reader.open(msgpack.packb([offer.address, offer.num_blocks, offer.nonce]), P, ours) is None
        await eventually(lambda: prefill.door.num_pairs == 0)

    async def test_other_blocks(self, prefill: Prefill, reader: NcclReader) -> None:
        other = KvLayout(1, 16, 4, 32, "float32", "another model")
        assert await reader.open(prefill.detail(), P, DeviceStore(4, other)) is None

    async def test_a_prefill_worker_that_cannot_be_reached_is_not_tried_again_at_once(
        self, reader: NcclReader, ours: DeviceStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prefill = Prefill(DeviceStore(NUM_BLOCKS, SHARED_LAYOUT))
        prefill.address = "127.0.0.1:1"
        assert await reader.open(prefill.detail(), P, ours) is None
        monkeypatch.setattr(nccl, "_Stream", None)
        assert await reader.open(prefill.detail(), P, ours) is None

    @pytest.mark.parametrize(
        "detail",
        [
            b"",
            b"\xc1",
            *(msgpack.packb(each) for each in ([], 7, ["no port", 4, b"n"], ["a:1", 0, b"n"], ["a:1", 4, b""])),
        ],
    )
    async def test_malformed_details(self, detail: bytes, reader: NcclReader, ours: DeviceStore) -> None:
        assert await reader.open(detail, P, ours) is None


class Deaf:
    """A group whose messages never go out, as of a process that is stopped."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self.is_deaf = False
        self.abort = group.abort
        self.recv = group.recv

    def send(self, tensors: list[object], peer: int, tag: int) -> ring.Work:
        if self.is_deaf:
            return _Never()
        return self._group.send(tensors, peer, tag)  # type: ignore[arg-type]


class _Silent:
    """A group whose messages are gone at once. ``messages``: where they lay."""

    def __init__(self) -> None:
        self.messages: list[Tensor] = []

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> ring.Work:
        self.messages += tensors
        return _Never()

    recv = send

    def abort(self) -> None:
        pass


class _Never:
    def wait(self, timeout: timedelta) -> bool:
        return True


class TestFailures:
    async def test_a_receive_that_is_given_up_ends_the_communicator_and_the_next_makes_another(
        self, ours: DeviceStore, reader: NcclReader, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[Deaf] = []

        def groups(meeting: Meeting, rank: int) -> Group:
            made.append(Deaf(gloo_group(meeting, rank)))
            return made[-1]

        monkeypatch.setattr(ring, "STALL", timedelta(seconds=0.5))
        store = DeviceStore(NUM_BLOCKS, SHARED_LAYOUT)
        store.fill(make_offer(NUM_BLOCKS, layout=SHARED_LAYOUT))
        prefill = Prefill(store)
        prefill.door._groups = groups
        async with serving(prefill):
            source = await opened(reader, prefill, ours)
            made[0].is_deaf = True
            assert await place(source, [1, 2], [1, 2], ours) == [False, False]
            assert not any(ours.read(BlockId(1))), "nothing but the ring was written"
            assert await place(source, [1, 2], [1, 2], ours) == [True, True]
            assert ours.read(BlockId(2)) == store.read(BlockId(2))
            assert len(made) == 2
            assert reader.num_pairs == prefill.door.num_pairs == 1
            source.close()

    async def test_a_prefill_worker_that_goes_takes_the_communicator_along(
        self, reader: NcclReader, ours: DeviceStore
    ) -> None:
        async with serving(Prefill(DeviceStore(NUM_BLOCKS, SHARED_LAYOUT))) as prefill:
            source = await opened(reader, prefill, ours)
            assert reader.num_pairs == 1
        await eventually(lambda: reader.num_pairs == 0)
        assert await place(source, [1], [1], ours) == [False]
        source.close()

    async def test_nothing_is_kept_of_a_dead_worker(self, reader: NcclReader, ours: DeviceStore) -> None:
        async with serving(Prefill(DeviceStore(NUM_BLOCKS, SHARED_LAYOUT))) as prefill:
            source = await opened(reader, prefill, ours)
        await eventually(lambda: reader.num_pairs == 0)
        source.close()
        assert reader._peers == {}

    async def test_a_decode_worker_that_goes_takes_the_communicator_along(
        self, prefill: Prefill, reader: NcclReader, ours: DeviceStore
    ) -> None:
        (await opened(reader, prefill, ours)).close()
        assert prefill.door.num_pairs == 1
        reader.close()
        await eventually(lambda: prefill.door.num_pairs == 0)

    async def test_a_decode_worker_that_comes_again_replaces_itself(self, prefill: Prefill, ours: DeviceStore) -> None:
        first, second = NcclReader(D, groups=gloo_group), NcclReader(D, groups=gloo_group)
        await opened(first, prefill, ours)
        source = await opened(second, prefill, ours)
        await eventually(lambda: first.num_pairs == 0)
        assert prefill.door.num_pairs == 1
        assert await place(source, [1], [1], ours) == [True]
        for each in (first, second):
            each.close()

    async def test_a_block_that_is_not_there_ends_the_stream(
        self, prefill: Prefill, reader: NcclReader, ours: DeviceStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ring, "STALL", timedelta(seconds=0.5))  # Gloo's abort wakes nobody, as NCCL's does
        detail = msgpack.packb([prefill.address, NUM_BLOCKS + 1, ours.blocks.nonce])
        source = await reader.open(detail, P, ours)
        assert source is not None
        assert await place(source, [NUM_BLOCKS], [1], ours) == [False]
        source.close()


class TestBounds:
    async def test_the_least_recently_used_goes_on_ds_side(self, ours: DeviceStore) -> None:
        reader = NcclReader(D, groups=gloo_group, max_pairs=2)
        stores = [DeviceStore(NUM_BLOCKS, SHARED_LAYOUT) for _ in range(3)]
        epochs = [Epoch(f"p{n}") for n in range(3)]
        first, second, third = (Prefill(store, epoch=epoch) for store, epoch in zip(stores, epochs, strict=True))
        async with serving(first), serving(second), serving(third):
            kept = await opened(reader, first, ours, epochs[0])
            (await opened(reader, second, ours, epochs[1])).close()
            (await opened(reader, third, ours, epochs[2])).close()
            assert reader.num_pairs == 2
            await eventually(lambda: second.door.num_pairs == 0)
            assert await place(kept, [1], [1], ours) == [True], "what is used stays"
            also = await opened(reader, third, ours, epochs[2])
            assert await reader.open(second.detail(), epochs[1], ours) is None, "all there may be are in use"
            for source in (kept, also):
                source.close()
            reader.close()

    async def test_the_least_recently_used_goes_on_ps_side(self, ours: DeviceStore) -> None:
        readers = [NcclReader(Epoch(f"d{n}"), groups=gloo_group) for n in range(3)]
        store = DeviceStore(NUM_BLOCKS, SHARED_LAYOUT)
        async with serving(Prefill(store, max_pairs=2)) as prefill:
            sources = [await opened(reader, prefill, ours) for reader in readers[:2]]
            assert await place(sources[0], [1], [1], ours) == [True]
            sources.append(await opened(readers[2], prefill, ours))
            await eventually(lambda: [reader.num_pairs for reader in readers] == [1, 0, 1])
            assert prefill.door.num_pairs == 2
            for reader in readers:
                reader.close()


class TestRefusing:
    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (pairs.encode_from_d(Join(Epoch("p before"), D, "layout", 4)), fences.Refused.FOREIGN_EPOCH),
            (pairs.encode_from_d(FetchNonce()), fences.Refused.MALFORMED),
            (b"\xc1", fences.Refused.MALFORMED),
        ],
    )
    async def test_what_the_door_does_not_take_is_counted(self, data: bytes, reason: fences.Refused) -> None:
        async with serving(Prefill(Store(NUM_BLOCKS, SHARED_LAYOUT))) as prefill, channel(prefill.address) as raw:
            call = raw.stream_stream(f"/{pairs.SERVICE}/{pairs.METHOD}")()
            await call.write(data)
            while await call.read() is not grpc.aio.EOF:
                pass
            assert (prefill.refusals[reason], prefill.refusals.total) == (1, 1)


class TestMessages:
    @pytest.mark.parametrize("message", [Join(P, D, "layout", 4), FetchNonce(), Fetch((BlockId(3), BlockId(0)))])
    def test_from_d(self, message: pairs.FromD) -> None:
        assert pairs.decode_from_d(pairs.encode_from_d(message)) == message

    @pytest.mark.parametrize("message", [Opened(4711), Refused("full")])
    def test_from_p(self, message: pairs.FromP) -> None:
        assert pairs.decode_from_p(pairs.encode_from_p(message)) == message

    @pytest.mark.parametrize("decode", [pairs.decode_from_d, pairs.decode_from_p])
    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\xc1",
            *(
                msgpack.packb(each)
                for each in ([], [1], [1, "?"], ["1", "nonce"], [99, "nonce"], [1, "fetch", [-1]], [1, "opened", 0], 7)
            ),
        ],
    )
    def test_malformed_ones(self, decode: Callable[[bytes], object], data: bytes) -> None:
        with pytest.raises(RemoteProtocolError):
            decode(data)


class TestChoice:
    def test_it_is_for_those_who_name_it(self) -> None:
        assert "nccl" not in allowed_names(("auto",))
        names = [
            offer.name for offer in transport_offers(("nccl", "grpc"), DeviceStore(1, SHARED_LAYOUT), address="p:1")
        ]
        assert names == ["nccl", "grpc"]
        assert [offer.name for offer in transport_offers(("nccl", "grpc"), Store(1), address="p:1")] == ["grpc"]
        assert [each.name for each in payload_readers(("nccl", "grpc"), D)] == ["nccl", "grpc"]

    def test_not_beside_encryption_unless_that_is_said(self) -> None:
        tls = TlsFiles(authority=Path("ca.pem"))
        with pytest.raises(SettingsError, match="--nccl-beside-tls"):
            allowed_names(("nccl", "grpc"), tls)
        assert allowed_names(("nccl", "grpc"), tls, nccl_beside_tls=True) == ("nccl", "grpc")
        assert allowed_names(("auto",), tls) == ("shm", "cuda_ipc", "grpc")

    def test_the_offer_survives_the_wire(self) -> None:
        offer = NcclOffer("10.0.0.2:4000", 7, bytes(16))
        assert read_offer(msgpack.packb(["10.0.0.2:4000", 7, bytes(16), "of a newer version"])) == offer


@pytest.mark.parametrize("end", ["stdin", "kill"])
async def test_between_two_processes(end: str, reader: NcclReader) -> None:
    tier = Tier(DeviceStore(24, SHARED_LAYOUT))
    fences = FenceTable(D, 100.0)

    async def on_link(link: Link) -> None:
        await ReceiveSession(link, tier.store, tier, fences, readers=(reader,)).run()

    server, port = await serve("127.0.0.1", 0, [grpc_link.handoff_handler(on_link)])
    keep = ("--keep",) if end == "kill" else ()
    arguments = (sys.executable, "-m", "tests.support.gpu_sender", f"127.0.0.1:{port}", "nccl", "24", *keep)
    sender = await asyncio.create_subprocess_exec(
        *arguments, cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert sender.stdin is not None
    assert sender.stdout is not None
    said = (await sender.stdout.readline()).decode().split()
    if end == "kill":
        assert said == ["nccl", "granted"]
        os.kill(sender.pid, signal.SIGKILL)
        await tier.is_over.wait()
        assert tier.freed_with[0][1] == "peer_lost"
    else:
        assert said == ["nccl", "granted", "adopted", "released"]
        assert tier.told == ["reserve", "sealed", "adopted"]
        assert tier.holds(make_offer(24, layout=SHARED_LAYOUT))
        sender.stdin.close()
    await sender.wait()
    await eventually(lambda: reader.num_pairs == 0)
    await server.stop(None)
