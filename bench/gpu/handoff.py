"""Hand-offs between two processes on one device, by the workers' own sessions: how long the copy takes, and the rest.

sender (a process)   memory ──┐ offer, places, seal over gRPC
here                          └──▶ mapped; copied into our memory, summed there, adopted
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gpu import beside
from bench.gpu.children import environment
from bench.gpu.figures import Entry, Figure, Goal
from bench.gpu.lab import Lab
from bench.gpu.sender import DECODE
from bench.gpu.sizes import BLOCK_SIZE
from engine import device_blocks
from engine.device_blocks import BlockKernels, CudaLane, DeviceBlocks
from engine.kv_memory import KvMemory
from kvtransfer.fences import FenceTable
from kvtransfer.session import ReceiveSession
from kvtransfer.transport import Link
from kvtransfer.transports import grpc as grpc_link
from kvtransfer.transports.choice import payload_readers
from proto.handoff import Fence, Offer, Seal
from proto.ids import BlockId
from proto.layout import KvLayout, MemoryExport
from service.rpc import serve

_COUNT = 12
_NOT_COUNTED = 2
_COPY = Goal(0.6)
_LIMIT_S = 120.0
_PAUSE_CYCLES = 400_000
"""About 0.2 ms of a GPU's clock."""


def measure(lab: Lab) -> Iterator[Entry]:
    shape = lab.sizes.model
    layout = KvLayout(shape.layers, BLOCK_SIZE, shape.kv_heads, shape.head_dim, "bfloat16", "")
    num_blocks = lab.sizes.handoff_tokens // BLOCK_SIZE
    store = _Store(layout, num_blocks, lab.device)
    transport = "cuda_ipc" if lab.is_gpu else "shm"
    durations = asyncio.run(_receive(store, transport, num_blocks, lab.device.type))
    store.memory.close()
    size = num_blocks * layout.block_bytes
    whole = statistics.median(durations[_NOT_COUNTED::2])
    case = f"{lab.sizes.handoff_tokens} tokens ({size / 2**20:,.0f} MiB) by {transport}"
    if lab.is_gpu:
        copied = statistics.median(store.spans.seconds("copy")[_NOT_COUNTED + 1 :: 2])
        summed = statistics.median(store.spans.seconds("sum")[_NOT_COUNTED + 1 :: 2])
        rate = 2 * size / copied
        of = f"copy's {lab.ceilings.bytes_per_s / 1e9:,.0f} GB/s, read and written"
        yield Figure(f"{case}: the copy", copied * 1e3, "ms", rate / lab.ceilings.bytes_per_s, of, _COPY)
        yield Figure(f"{case}: checksums", summed * 1e3, "ms", summed / copied, "the copy's time")
        control = whole - copied - summed
        yield Figure(
            f"{case}: control, the sender's checksums among it", control * 1e3, "ms", control / whole, "the whole"
        )
    yield Figure(f"{case}: from grant to adoption, {whole * 1e3:,.4g} ms", size / whole / 1e9, "GB/s")
    yield from beside.measure(lab)


class _Spans:
    """Device time of each kind of work, by events around it; hand-off by hand-off.

    In the second hand-off, the fourth and so on the device is kept busy until the work has been queued: what lies
    between the events is then the work alone. The others are as fast as they are.
    """

    def __init__(self) -> None:
        self._handoffs: list[list[tuple[str, torch.cuda.Event, torch.cuda.Event]]] = [[]]

    def around(self, kind: str, work: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def timed(*args: Tensor) -> Tensor | None:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            if len(self._handoffs) % 2 == 0:
                torch.cuda._sleep(_PAUSE_CYCLES)  # type: ignore[no-untyped-call]
            begin.record()
            result = work(*args)
            end.record()
            self._handoffs[-1].append((kind, begin, end))
            return result

        return timed

    def next(self) -> None:
        """The hand-off that was measured is over; its work has been done."""
        self._handoffs.append([])

    def seconds(self, kind: str) -> list[float]:
        """Of each hand-off that is over."""
        return [
            sum(begin.elapsed_time(end) for name, begin, end in spans if name == kind) / 1000
            for spans in self._handoffs[:-1]
        ]


class _Store:
    """A decode worker's memory whose copies and sums are timed where it lies on a GPU. As ``BlockStore``."""

    def __init__(self, layout: KvLayout, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.memory = KvMemory(layout, num_blocks, device)
        self.spans = _Spans()
        self._blocks: DeviceBlocks | None = None
        if (plain := self.memory.on_device()) is not None:
            kernels = device_blocks.choose(device, layout.block_bytes)
            timed = BlockKernels(
                self.spans.around("copy", kernels.copy_blocks),  # type: ignore[arg-type]
                self.spans.around("sum", kernels.sum_blocks),  # type: ignore[arg-type]
            )
            self._blocks = DeviceBlocks(
                plain.memory, num_blocks, layout.block_bytes, plain.nonce, lane=CudaLane(device), kernels=timed
            )

    def read(self, block: BlockId) -> memoryview:
        return self.memory.read(block)

    def write(self, block: BlockId, data: bytes | memoryview) -> None:
        self.memory.write(block, data)

    def export(self) -> MemoryExport | None:
        return self.memory.export()

    def on_device(self) -> DeviceBlocks | None:
        return self._blocks


@dataclass(frozen=True, slots=True)
class _Room:
    blocks: Sequence[BlockId]
    num_present: int = 0


class _Intake:
    """Grants every offer the same blocks. ``durations``: seconds from grant to adoption."""

    def __init__(self, spans: _Spans) -> None:
        self._spans = spans
        self.durations: list[float] = []
        self.faults: list[str] = []

    async def reserve(self, offer: Offer) -> _Room:
        return _Room([BlockId(block) for block in range(len(offer.hashes))])

    async def sealed(self, fence: Fence, seal: Seal) -> None:
        pass

    async def adopted(self, fence: Fence, seal: Seal, num_bytes: int, duration_s: float) -> None:
        self.durations.append(duration_s)
        self._spans.next()

    async def freed(self, fence: Fence, num_verified: int, reason: str) -> None:
        self.faults.append(reason)


async def _receive(store: _Store, transport: str, num_blocks: int, device: str) -> list[float]:
    """Seconds of each hand-off. Raises RuntimeError where one did not come about."""
    intake, fences = _Intake(store.spans), FenceTable(DECODE, 600.0)
    readers = payload_readers((transport,), DECODE)

    async def on_link(link: Link) -> None:
        await ReceiveSession(link, store, intake, fences, readers=readers).run()

    server, port = await serve("127.0.0.1", 0, [grpc_link.handoff_handler(on_link)])
    layout = store.layout
    numbers = (_COUNT, layout.num_layers, layout.block_size, layout.kv_heads, layout.head_dim)
    arguments = (f"127.0.0.1:{port}", device, transport, *map(str, numbers), layout.dtype, str(num_blocks))
    sender = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.gpu.sender", *arguments, env=environment()
    )
    try:
        async with asyncio.timeout(_LIMIT_S):
            status = await sender.wait()
    finally:
        if sender.returncode is None:
            sender.kill()
        for reader in readers:
            reader.close()
        await server.stop(None)
    if status != 0 or len(intake.durations) != _COUNT:
        raise RuntimeError(f"{len(intake.durations)} of {_COUNT} hand-offs, sender's status {status}; {intake.faults}")
    return intake.durations
