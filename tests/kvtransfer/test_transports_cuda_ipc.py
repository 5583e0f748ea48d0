"""CUDA IPC without a GPU: the driver is made up, and everything above it is what runs on one."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import msgpack
import pytest

from kvtransfer.fences import FenceTable
from kvtransfer.session import ReceiveSession, SendSession
from kvtransfer.transport import Link
from kvtransfer.transports import GRPC, InlineReader, inline_offers
from kvtransfer.transports import grpc as grpc_link
from kvtransfer.transports.choice import payload_readers, transport_offers
from kvtransfer.transports.cuda_driver import CudaDriver
from kvtransfer.transports.cuda_ipc import CudaIpcReader, DeviceExport, IpcUnavailable, cuda_ipc_offer, read_export
from kvtransfer.transports.memory import MemoryNetwork
from proto.control import Peer
from proto.errors import DeviceLost, SettingsError
from proto.handoff import Located
from proto.ids import BlockId, Epoch, WorkerId
from service.rpc import serve
from tests.support.device import NONCE, DeviceStore, FakeDriver
from tests.support.handoff import CHOICES, SHARED_LAYOUT, Ear, Store, Tier, make_offer

ROOT = Path(__file__).parents[2]
P = Epoch("p")
BLOCK_BYTES = SHARED_LAYOUT.block_bytes
NUM_BLOCKS = 4

needs_no_driver = pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a CUDA driver here")


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture
def theirs(driver: FakeDriver) -> DeviceStore:
    memory = driver.allocate(NUM_BLOCKS * BLOCK_BYTES + len(NONCE))
    return DeviceStore(NUM_BLOCKS, SHARED_LAYOUT, memory=memory)


@pytest.fixture
def ours() -> DeviceStore:
    return DeviceStore(NUM_BLOCKS, SHARED_LAYOUT)


def offered(driver: FakeDriver, store: DeviceStore, **changes: object) -> bytes:
    export = read_export(cuda_ipc_offer(driver, store.blocks).detail)
    assert export is not None
    return bytes(msgpack.packb(astuple(replace(export, **changes))))  # type: ignore[arg-type]


async def test_blocks_are_copied_in_one_go(driver: FakeDriver, theirs: DeviceStore, ours: DeviceStore) -> None:
    blocks = theirs.fill(make_offer(NUM_BLOCKS, layout=SHARED_LAYOUT))
    before = theirs.blocks.memory.clone()
    reader = CudaIpcReader(driver)
    source = await reader.open(offered(driver, theirs), P, ours)
    assert source is not None
    ours.lane.told.clear()
    payloads = [Located(block * BLOCK_BYTES) for block in blocks]
    assert await source.place(payloads, [BlockId(3), BlockId(2), BlockId(1), BlockId(0)], ours) == [True] * 4
    assert ours.lane.told == ["enter", "finish"], "one launch for all, waited for once"
    assert all(ours.read(BlockId(3 - block)) == theirs.read(block) for block in blocks)
    assert theirs.blocks.memory.equal(before), "P's memory is only read"
    source.close()
    source.close()
    reader.close()
    assert driver.closed == driver.opened


async def test_one_mapping_serves_all_hand_offs_of_an_incarnation(
    driver: FakeDriver, theirs: DeviceStore, ours: DeviceStore
) -> None:
    reader, detail = CudaIpcReader(driver), offered(driver, theirs)
    sources = await asyncio.gather(*(reader.open(detail, P, ours) for _ in range(3)))
    assert len(driver.opened) == reader.num_mappings == 1
    reader.close()
    assert driver.closed == [], "sources that are open stay good"
    for source in sources:
        assert source is not None
        assert await source.place([Located(0)], [BlockId(0)], ours) == [True]
        source.close()
    assert driver.closed == driver.opened


async def test_places_where_no_block_lies(driver: FakeDriver, theirs: DeviceStore, ours: DeviceStore) -> None:
    reader = CudaIpcReader(driver)
    source = await reader.open(offered(driver, theirs), P, ours)
    assert source is not None
    theirs.fill(make_offer(NUM_BLOCKS, layout=SHARED_LAYOUT))
    payloads = [Located(NUM_BLOCKS * BLOCK_BYTES), b"inline", Located(BLOCK_BYTES), Located(1)]
    assert await source.place(payloads, [BlockId(0), BlockId(1), BlockId(2), BlockId(3)], ours) == [
        False,
        False,
        True,
        False,
    ]
    assert ours.read(BlockId(2)) == theirs.read(BlockId(1))
    assert not any(ours.read(BlockId(0)))
    assert await source.place([Located(1)], [BlockId(3)], ours) == [False]
    source.close()
    reader.close()


@pytest.mark.parametrize(
    "changes", [{"nonce": b"another nonce..."}, {"token": b"/nowhere"}, {"num_bytes": NUM_BLOCKS * BLOCK_BYTES}]
)
async def test_memory_that_is_not_what_was_meant_is_not_used(
    driver: FakeDriver, theirs: DeviceStore, ours: DeviceStore, changes: dict[str, object]
) -> None:
    reader = CudaIpcReader(driver)
    assert await reader.open(offered(driver, theirs, **changes), P, ours) is None
    assert reader.num_mappings == 0
    assert driver.closed == driver.opened


async def test_a_worker_on_a_cpu_takes_another_way(driver: FakeDriver, theirs: DeviceStore) -> None:
    assert await CudaIpcReader(driver).open(offered(driver, theirs), P, Store(4, SHARED_LAYOUT)) is None
    assert driver.opened == []


async def test_a_process_that_cannot_be_watched_is_let_go_of_at_once(
    driver: FakeDriver, theirs: DeviceStore, ours: DeviceStore
) -> None:
    """Its pid counts in another namespace: here the number is another process's."""
    reader = CudaIpcReader(driver)
    detail = offered(driver, theirs, pid_namespace=7)
    source = await reader.open(detail, P, ours)
    assert source is not None
    assert reader.num_mappings == 1
    source.close()
    assert reader.num_mappings == 0
    assert driver.closed == driver.opened


@pytest.mark.parametrize(
    "fields",
    [
        b"",
        b"\xc1",
        *(
            msgpack.packb(each)
            for each in (
                [],
                7,
                [1, 2, "token", 0, 16, b"n"],
                [1, 2, b"token", -1, 16, b"n"],
                [1, 2, b"t", 0, 3, b"long"],
            )
        ),
    ],
)
def test_malformed_details_are_not_understood(fields: bytes) -> None:
    assert read_export(fields) is None


def test_details_survive_the_wire() -> None:
    export = DeviceExport(12, 4026531836, bytes(64), 512, 4112, bytes(16))
    packed = msgpack.packb(astuple(export))
    assert read_export(packed) == export
    assert read_export(msgpack.packb([*astuple(export), "of a newer version"])) == export


@needs_no_driver
def test_without_a_driver_there_is_another_way_or_an_error_that_says_so(theirs: DeviceStore) -> None:
    with pytest.raises(IpcUnavailable, match="no CUDA driver"):
        CudaDriver()
    assert [reader.name for reader in payload_readers(("auto",), Epoch("d"))] == ["shm", "grpc"]
    with pytest.raises(SettingsError, match=r"no CUDA driver here.*allow grpc"):
        payload_readers(("cuda_ipc",), Epoch("d"))
    assert [offer.name for offer in transport_offers(("auto",), theirs)] == ["grpc"]
    with pytest.raises(SettingsError, match=r"no CUDA driver here.*allow grpc"):
        transport_offers(("cuda_ipc",), theirs)


class Decode:
    """A decode worker with a made-up GPU, within this process."""

    def __init__(self, network: MemoryNetwork, store: DeviceStore, driver: FakeDriver) -> None:
        self.tier = Tier(store)
        self.store = store
        self.reader = CudaIpcReader(driver)
        self.fault: Exception | None = None
        network.serve("d", self.on_link)

    async def on_link(self, link: Link) -> None:
        fences = FenceTable(Epoch("d"), 9.0)
        session = ReceiveSession(link, self.store, self.tier, fences, readers=(self.reader, InlineReader(GRPC)))
        try:
            await session.run()
        except DeviceLost as lost:
            self.fault = lost


async def test_blocks_change_owner_without_leaving_the_devices(
    driver: FakeDriver, theirs: DeviceStore, ours: DeviceStore
) -> None:
    network, ear = MemoryNetwork(), Ear()
    decode = Decode(network, ours, driver)
    offer = make_offer(
        NUM_BLOCKS, layout=SHARED_LAYOUT, transports=(cuda_ipc_offer(driver, theirs.blocks), *inline_offers("grpc"))
    )
    blocks = theirs.fill(offer)
    for store in (theirs, ours):
        store.read = store.write = None  # type: ignore[method-assign, assignment]
    session = SendSession(offer, theirs, network.connect, Peer(WorkerId("d"), Epoch("d"), "d"), ear)
    session.blocks_ready(0, blocks)
    session.seal(NUM_BLOCKS, SHARED_LAYOUT.block_size, CHOICES)
    await session.run()
    await network.drain()
    assert ear.transport == "cuda_ipc"
    assert ear.told == ["granted", "adopted", "released"]
    assert decode.tier.told == ["reserve", "sealed", "adopted"]
    assert ours.blocks.regions.equal(theirs.blocks.regions)
    decode.reader.close()


async def test_a_block_that_changed_under_the_reader_is_noticed_on_the_device(
    driver: FakeDriver, theirs: DeviceStore, ours: DeviceStore
) -> None:
    network, ear = MemoryNetwork(), Ear()
    decode = Decode(network, ours, driver)
    offer = make_offer(2, layout=SHARED_LAYOUT, transports=(cuda_ipc_offer(driver, theirs.blocks),))
    blocks = theirs.fill(offer)
    session = SendSession(offer, theirs, network.connect, Peer(WorkerId("d"), Epoch("d"), "d"), ear)
    running = asyncio.create_task(session.run())
    await ear.until("granted")
    session.blocks_ready(0, blocks[:1])
    await session._blocks.sum(0)
    theirs.write(blocks[0], bytes(BLOCK_BYTES))
    await decode.tier.is_over.wait()
    assert decode.tier.freed_with == [(0, "corrupt")]
    session.withdraw("enough")
    await running
    await network.drain()
    decode.reader.close()


async def test_a_copy_that_costs_the_device_says_so_and_frees_the_reservation(
    driver: FakeDriver, theirs: DeviceStore, ours: DeviceStore
) -> None:
    """P died during the copy, and took D's context along."""
    network, ear = MemoryNetwork(), Ear()
    decode = Decode(network, ours, driver)
    offer = make_offer(2, layout=SHARED_LAYOUT, transports=(cuda_ipc_offer(driver, theirs.blocks),))
    blocks = theirs.fill(offer)
    session = SendSession(offer, theirs, network.connect, Peer(WorkerId("d"), Epoch("d"), "d"), ear)
    running = asyncio.create_task(session.run())
    await ear.until("granted")
    ours.lane.lose_device()
    session.blocks_ready(0, blocks[:1])
    await decode.tier.is_over.wait()
    assert decode.tier.freed_with == [(0, "internal error")]
    session.withdraw("enough")
    await running
    await network.drain()
    assert isinstance(decode.fault, DeviceLost)
    decode.reader.close()
    assert driver.closed == driver.opened


@pytest.mark.parametrize(
    "end", [lambda sender: sender.stdin.close(), lambda sender: os.kill(sender.pid, signal.SIGKILL)]
)
async def test_between_two_processes(end: Callable[[asyncio.subprocess.Process], None]) -> None:
    is_closed = asyncio.Event()
    driver, store = FakeDriver(is_closed.set), DeviceStore(24, SHARED_LAYOUT)
    reader, fences, tier = CudaIpcReader(driver), FenceTable(Epoch("d"), 100.0), Tier(store)

    async def on_link(link: Link) -> None:
        await ReceiveSession(link, store, tier, fences, readers=(reader,)).run()

    server, port = await serve("127.0.0.1", 0, [grpc_link.handoff_handler(on_link)])
    arguments = (sys.executable, "-m", "tests.support.gpu_sender", f"127.0.0.1:{port}", "cuda_ipc", "24")
    sender = await asyncio.create_subprocess_exec(
        *arguments, cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert sender.stdout is not None
    assert (await sender.stdout.readline()).decode().split() == ["cuda_ipc", "granted", "adopted", "released"]
    assert tier.holds(make_offer(24, layout=SHARED_LAYOUT))
    assert reader.num_mappings == 1
    end(sender)
    await sender.wait()
    await is_closed.wait()
    assert reader.num_mappings == 0, "a dead process's memory is not kept behind it"
    await server.stop(None)


async def test_a_kill_in_the_middle_of_copies() -> None:
    """On a GPU CUDA decides what becomes of D; it goes on, or it says that its device is lost and ends."""
    arguments = (sys.executable, "-m", "tests.support.ipc_pair")
    holding = await asyncio.create_subprocess_exec(*arguments, "hold", cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    assert holding.stdout is not None
    offer = (await holding.stdout.readline()).decode().strip()
    copying = await asyncio.create_subprocess_exec(
        *arguments, "copy", offer, str(holding.pid), cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert copying.stdout is not None
    assert await copying.stdout.readline() == b"copying\n"
    os.kill(holding.pid, signal.SIGKILL)
    await holding.wait()
    said, _ = await copying.communicate()
    assert (said, copying.returncode) in ((b"alive\n", 0), (b"lost\n", 1))
