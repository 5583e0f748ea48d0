"""A decode step alone, and while hand-offs bring blocks into the same device's memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bench.gpu.engines import opened, settings
from bench.gpu.figures import Entry, Figure
from bench.gpu.lab import Lab
from bench.gpu.sizes import BLOCK_SIZE
from engine.kv_memory import KvMemory
from kvtransfer.sums import block_sums
from proto.ids import BlockHash, BlockId
from proto.layout import KvLayout


@dataclass
class _Brought:
    num_bytes: int = 0
    seconds: float = 0.0


def measure(lab: Lab) -> Iterator[Entry]:
    """The worst case: hand-offs without a pause. Both want the memory's rate, so a step takes somewhat longer."""
    sizes = lab.sizes
    rows = sizes.quantised_batch
    with opened(settings(lab)) as engine:
        alone = engine.decode_step_s(rows, sizes.context, sizes.num_steps)
        with _bringing(engine.parts.facts.layout, sizes.handoff_tokens // BLOCK_SIZE, lab.device) as brought:
            beside = engine.decode_step_s(rows, sizes.context, sizes.num_steps)
    rate = brought.num_bytes / brought.seconds / 1e9
    yield Figure(
        f"a decode step of {rows} while hand-offs bring {rate:,.3g} GB/s",
        beside * 1e3,
        "ms",
        beside / alone,
        f"{alone * 1e3:.4g} ms alone",
    )


@contextmanager
def _bringing(layout: KvLayout, num_blocks: int, device: torch.device) -> Iterator[_Brought]:
    """Inside, one hand-off after the other is copied and summed by a thread, as a decode worker does it."""
    memory = KvMemory(layout, num_blocks, device)
    hand_over = _handoff(memory, num_blocks)
    memory.fence()  # as when blocks are reserved: from here on transfers wait for no step
    brought, is_over = _Brought(), threading.Event()

    def bring() -> None:
        began = time.perf_counter()
        while not is_over.is_set() or not brought.num_bytes:
            hand_over()
            brought.num_bytes += num_blocks * layout.block_bytes
        brought.seconds = time.perf_counter() - began

    try:
        with ThreadPoolExecutor(1) as threads:
            bringing = threads.submit(bring)
            try:
                yield brought
            finally:
                is_over.set()
            bringing.result()
    finally:
        memory.close()


def _handoff(memory: KvMemory, num_blocks: int) -> Callable[[], None]:
    """What D does with the blocks of one: from memory that it reads into its own, and their checksums."""
    blocks = [BlockId(block) for block in range(num_blocks)]
    hashes = [BlockHash(bytes(16))] * num_blocks
    block_bytes, sums, device = memory.layout.block_bytes, block_sums(memory), memory.on_device()
    if device is not None:
        theirs = torch.zeros((num_blocks, block_bytes), dtype=torch.uint8, device=memory.device)

        def copy_and_sum() -> None:
            device.copy_in(theirs, blocks, blocks)
            sums.of(blocks, hashes)

        return copy_and_sum
    payload = bytes(block_bytes)

    def write_and_sum() -> None:
        for block in blocks:
            memory.write(block, payload)
        sums.of(blocks, hashes)

    return write_and_sum
