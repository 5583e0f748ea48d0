"""Two processes and one memory, on a GPU where there is one: a prefill worker has it, a decode worker copies from it.

    python -m tests.support.ipc_pair hold             prints what it offers, in hexadecimal; lives until it is killed
    python -m tests.support.ipc_pair copy OFFER PID   copies and checks until the process PID has ended, and after that

The second one prints "copying", then what became of it: "alive", or "lost" where its device went with its peer's death.
It ends as a decode worker does: by itself, with status 1, when the device is lost.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import torch

from engine.kv_memory import KvMemory
from kvtransfer.integrity import BlockChecksum
from kvtransfer.sums import block_sums
from kvtransfer.transport import BlockStore
from kvtransfer.transports.cuda_driver import CudaDriver
from kvtransfer.transports.cuda_ipc import CudaIpcReader, IpcDriver, cuda_ipc_offer
from proto.errors import DeviceLost
from proto.handoff import Located
from proto.ids import BlockId, Epoch
from tests.support.device import NONCE, DeviceStore, FakeDriver
from tests.support.handoff import SHARED_LAYOUT, block_hash

NUM_BLOCKS = 64
MORE_ROUNDS = 20


def make() -> tuple[BlockStore, IpcDriver]:
    if torch.cuda.is_available():
        return KvMemory(SHARED_LAYOUT, NUM_BLOCKS, torch.device("cuda")), CudaDriver()
    driver = FakeDriver()
    memory = driver.allocate(NUM_BLOCKS * SHARED_LAYOUT.block_bytes + len(NONCE))
    return DeviceStore(NUM_BLOCKS, SHARED_LAYOUT, memory=memory), driver


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def hold() -> None:
    store, driver = make()
    device = store.on_device()
    assert device is not None
    for block in range(NUM_BLOCKS):
        store.write(BlockId(block), content(block))
    say(cuda_ipc_offer(driver, device).detail.hex())
    signal.pause()


async def copy(offer: str, pid: int) -> None:
    store, driver = make()
    source = await CudaIpcReader(driver).open(bytes.fromhex(offer), Epoch("p"), store)
    assert source is not None, "the offer is good"
    sums, blocks = block_sums(store), [BlockId(block) for block in range(NUM_BLOCKS)]
    payloads = [Located(block * SHARED_LAYOUT.block_bytes) for block in blocks]
    hashes = [block_hash(block) for block in blocks]
    checksum = BlockChecksum(SHARED_LAYOUT.block_bytes)
    right = [checksum.of(content(block), name) for block, name in zip(blocks, hashes, strict=True)]
    process = os.pidfd_open(pid)
    await source.place(payloads, blocks, store)
    assert sums.of(blocks, hashes) == right, "what was copied is what was offered"
    num_rounds_left = MORE_ROUNDS
    say("copying")
    while num_rounds_left:
        await source.place(payloads, blocks, store)
        sums.of(blocks, hashes)
        if has_ended(process):
            num_rounds_left -= 1
    say("alive")


def content(block: int) -> bytes:
    return bytes([block]) * SHARED_LAYOUT.block_bytes


def has_ended(process: int) -> bool:
    try:
        signal.pidfd_send_signal(process, 0)
    except ProcessLookupError:
        return True
    return False


if __name__ == "__main__":
    if sys.argv[1] == "hold":
        hold()
    try:
        asyncio.run(copy(sys.argv[2], int(sys.argv[3])))
    except DeviceLost:
        say("lost")
        sys.exit(1)
