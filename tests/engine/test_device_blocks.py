"""Device blocks over CPU tensors: what is copied and summed, when, and what becomes of a device that is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from engine.device_blocks import REFERENCE, CudaLane, DeviceBlocks, choose, naming_its_loss
from kvtransfer.integrity import BlockChecksum, finalise
from kvtransfer.transports.device import device_key
from proto.errors import DeviceLost
from tests.support.device import Lane
from tests.support.handoff import block_hash

BLOCK_BYTES, NUM_BLOCKS, NONCE = 64, 6, b"0123456789abcdef"


@pytest.fixture
def lane() -> Lane:
    return Lane()


@pytest.fixture
def blocks(lane: Lane) -> DeviceBlocks:
    memory = torch.arange(NUM_BLOCKS * BLOCK_BYTES + 16, dtype=torch.int64).to(torch.uint8)
    return DeviceBlocks(memory, NUM_BLOCKS, BLOCK_BYTES, NONCE, lane=lane, kernels=REFERENCE)


def test_the_nonce_lies_behind_the_last_block(blocks: DeviceBlocks) -> None:
    assert blocks.memory[-16:].numpy().tobytes() == NONCE
    blocks.copy_in(torch.zeros(1, BLOCK_BYTES, dtype=torch.uint8), [0], [NUM_BLOCKS - 1])
    assert blocks.memory[-16:].numpy().tobytes() == NONCE
    assert not blocks.regions[NUM_BLOCKS - 1].any()


def test_copies_go_where_they_should(blocks: DeviceBlocks) -> None:
    source = torch.randint(256, (3, BLOCK_BYTES), dtype=torch.uint8)
    before = blocks.regions.clone()
    blocks.copy_in(source, [2, 0], [4, 1])
    assert torch.equal(blocks.regions[4], source[2])
    assert torch.equal(blocks.regions[1], source[0])
    untouched = [0, 2, 3, 5]
    assert torch.equal(blocks.regions[untouched], before[untouched])
    target = torch.zeros(4, BLOCK_BYTES, dtype=torch.uint8)
    blocks.copy_out([1, 4, 5], target)
    assert torch.equal(target[:3], blocks.regions[[1, 4, 5]])
    assert not target[3].any()


def test_bytes_in_and_out(blocks: DeviceBlocks) -> None:
    data = bytes(range(BLOCK_BYTES))
    blocks.write(3, data)
    assert blocks.read(3) == data
    assert blocks.regions[3].numpy().tobytes() == data


def test_totals_make_the_checksums_of_the_cpu(blocks: DeviceBlocks) -> None:
    totals = blocks.totals([5, 0, 5], device_key(BLOCK_BYTES, blocks.memory.device))
    checksum = BlockChecksum(BLOCK_BYTES)
    assert [finalise(total, block_hash(1), BLOCK_BYTES) for total in totals] == [
        checksum.of(blocks.read(block), block_hash(1)) for block in (5, 0, 5)
    ]


def test_every_call_is_done_when_it_returns(blocks: DeviceBlocks, lane: Lane) -> None:
    blocks.fence()
    blocks.copy_in(torch.zeros(1, BLOCK_BYTES, dtype=torch.uint8), [0], [0])
    blocks.copy_out([0], torch.zeros(1, BLOCK_BYTES, dtype=torch.uint8))
    blocks.write(0, blocks.read(1))
    assert lane.told == ["fence", *["enter", "finish"] * 4]
    with blocks.beside_steps():
        pass
    assert lane.told[-1] == "enter", "what is queued there is waited for by whoever queued it"


def test_landing_memory_is_the_lanes_and_free_of_what_was_queued(blocks: DeviceBlocks, lane: Lane) -> None:
    memory = blocks.landing(3 * BLOCK_BYTES)
    assert (memory.dtype, memory.shape, memory.device) == (torch.uint8, (3 * BLOCK_BYTES,), blocks.memory.device)
    assert lane.told == ["enter", "finish"]


class FakeCuda:
    """``torch.cuda`` as ``CudaLane`` uses it. ``told``: what is queued, on which stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[str] = []
        self.steps, self.current = FakeStream("steps", self), FakeStream("steps", self)
        self.num_events = 0
        for name, stands_in in (
            ("Stream", lambda device: FakeStream("lane", self)),
            ("Event", lambda blocking=False: FakeEvent(self)),
            ("current_stream", lambda device: self.current),
            ("default_stream", lambda device: self.steps),
            ("device", lambda device: nullcontext()),
            ("stream", self._stream),
        ):
            monkeypatch.setattr(torch.cuda, name, stands_in)

    @contextmanager
    def _stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


class FakeStream:
    def __init__(self, name: str, cuda: FakeCuda) -> None:
        self.name = name
        self._cuda = cuda

    def wait_event(self, event: FakeEvent) -> None:
        self._cuda.told.append(f"{self.name} waits for event {event.number}")

    def wait_stream(self, stream: FakeStream) -> None:
        self._cuda.told.append(f"{self.name} waits for all of {stream.name}")


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        cuda.num_events += 1
        self.number = cuda.num_events
        self._cuda = cuda

    def record(self, stream: FakeStream | None = None) -> None:
        self._cuda.told.append(f"event {self.number} on {(stream or self._cuda.current).name}")

    def synchronize(self) -> None:
        self._cuda.told.append(f"the thread waits for event {self.number}")


class TestCudaLane:
    """Transfers have a stream of their own. It waits for steps, as little as is right; steps never wait for it."""

    @pytest.fixture
    def cuda(self, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
        return FakeCuda(monkeypatch)

    def test_before_the_first_fence_it_waits_for_all_that_steps_have_queued(self, cuda: FakeCuda) -> None:
        with CudaLane(torch.device("cuda")).enter():
            assert cuda.current.name == "lane"
        assert cuda.told == ["lane waits for all of steps"]
        assert cuda.current.name == "steps"

    def test_behind_a_fence_it_waits_for_what_came_before_it_alone(self, cuda: FakeCuda) -> None:
        lane = CudaLane(torch.device("cuda"))
        lane.fence()
        for _ in range(2):  # however much steps have queued since
            with lane.enter():
                pass
        lane.fence()
        with lane.enter():
            pass
        waits = ["lane waits for event 1"] * 2
        assert cuda.told == ["event 1 on steps", *waits, "event 2 on steps", "lane waits for event 2"]

    def test_whoever_waits_for_its_work_waits_for_nothing_else(self, cuda: FakeCuda) -> None:
        lane = CudaLane(torch.device("cuda"))
        lane.fence()
        with lane.finish():
            cuda.told.append("a copy")
        assert cuda.told[1:] == ["lane waits for event 1", "a copy", "event 2 on lane", "the thread waits for event 2"]


def test_a_device_that_answers_no_more_is_lost_by_name(blocks: DeviceBlocks, lane: Lane) -> None:
    lane.lose_device()
    for work in (
        lambda: blocks.copy_in(torch.zeros(1, BLOCK_BYTES, dtype=torch.uint8), [0], [0]),
        lambda: blocks.copy_out([0], torch.zeros(1, BLOCK_BYTES, dtype=torch.uint8)),
        lambda: blocks.totals([0], device_key(BLOCK_BYTES, blocks.memory.device)),
        lambda: blocks.landing(BLOCK_BYTES),
        lambda: blocks.read(0),
        lambda: blocks.write(0, bytes(BLOCK_BYTES)),
    ):
        with pytest.raises(DeviceLost, match="illegal memory access"):
            work()


def test_an_error_that_leaves_the_device_alive_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="out of memory") as raised, naming_its_loss(lambda: True):
        raise RuntimeError("CUDA out of memory")
    assert not isinstance(raised.value, DeviceLost)


def test_tensors_on_a_cpu_are_moved_by_torch() -> None:
    assert choose(torch.device("cpu"), 4096) is REFERENCE
