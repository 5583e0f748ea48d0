"""Two processes and NIXL's own library: a prefill worker has memory, a decode worker reads it.

    python -m tests.support.nixl_pair hold           prints what it offers, in hexadecimal; lives until it is killed
    python -m tests.support.nixl_pair copy OFFER     copies and checks until that fails
    python -m tests.support.nixl_pair send ADDRESS   one hand-off over gRPC to the decode worker there

"copy" prints "copying", and "failed" when it does, with other content in its blocks by then. Once the library
has said that nothing is under way any more, it prints "untouched" if its blocks still are as they were. "send" prints
the transport that was chosen and how it ended, and lives until its standard input is closed.
"""

from __future__ import annotations

import asyncio
import signal
import sys

from kvtransfer.session import SendSession
from kvtransfer.transport import Link
from kvtransfer.transports import grpc as grpc_link
from kvtransfer.transports.choice import transport_offers
from kvtransfer.transports.nixl import NixlReader, nixl_offer
from kvtransfer.transports.nixl_agent import NixlAgent, sharing_agent
from proto.control import Peer
from proto.handoff import Located
from proto.ids import BlockId, Epoch, WorkerId
from tests.support.handoff import CHOICES, SHARED_LAYOUT, Ear, SharedStore, make_offer

NUM_BLOCKS = 1500
"""More than one READ's."""
NUM_SENT = 24
STALL_S = 2.0
EMPTY = bytes(SHARED_LAYOUT.block_bytes)


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def content(block: int) -> bytes:
    return bytes([1 + block % 255]) * SHARED_LAYOUT.block_bytes


def hold() -> None:
    store = SharedStore(NUM_BLOCKS, SHARED_LAYOUT)
    for block in range(NUM_BLOCKS):
        store.write(BlockId(block), content(block))
    say(nixl_offer(sharing_agent(), store).detail.hex())
    signal.pause()


async def copy(offer: str) -> None:
    store = SharedStore(NUM_BLOCKS, SHARED_LAYOUT)
    agent = NixlAgent(shares=False)
    reader = NixlReader(agent, stall_s=STALL_S)
    source = await reader.open(bytes.fromhex(offer), Epoch("p"), store)
    assert source is not None, "the offer is good"
    blocks = [BlockId(block) for block in range(NUM_BLOCKS)]
    payloads = [Located(block * SHARED_LAYOUT.block_bytes) for block in blocks]
    is_first = True
    while all(await source.place(payloads, blocks, store)):
        assert all(store.read(block) == content(block) for block in blocks), "what was copied is what was offered"
        if is_first:
            say("copying")
        is_first = False
    for block in blocks:
        store.write(block, EMPTY)
    say("failed")
    source.close()
    [peer] = reader._peers.values()
    while not peer.is_idle:  # noqa: ASYNC110 - a thread finds out
        await asyncio.sleep(0.02)
    assert all(store.read(block) == EMPTY for block in blocks)
    say("untouched")
    reader.close()


async def connect(peer: Peer) -> Link:
    return await grpc_link.connect(peer.address)


async def send(address: str) -> None:
    store, ear = SharedStore(NUM_SENT, SHARED_LAYOUT), Ear()
    transports = transport_offers(("nixl", "grpc"), store)
    offer = make_offer(NUM_SENT, layout=SHARED_LAYOUT, transports=transports)
    session = SendSession(offer, store, connect, Peer(WorkerId("d"), Epoch("d"), address), ear)
    session.blocks_ready(0, store.fill(offer))
    session.seal(NUM_SENT, SHARED_LAYOUT.block_size, CHOICES)
    await session.run()
    say(f"{ear.transport} {' '.join(ear.told)}")
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    if sys.argv[1] == "hold":
        hold()
    asyncio.run(send(sys.argv[2]) if sys.argv[1] == "send" else copy(sys.argv[2]))
