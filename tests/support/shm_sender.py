"""A prefill worker in a process of its own: memory that can be mapped, one prompt, one hand-off over gRPC.

    python -m tests.support.shm_sender ADDRESS DECODE_EPOCH NUM_BLOCKS

Prints the transport that was chosen and how it ended; then lives until its standard input is closed.
"""

from __future__ import annotations

import asyncio
import sys

from kvtransfer.session import SendSession
from kvtransfer.transport import Link
from kvtransfer.transports import grpc as grpc_link
from kvtransfer.transports.choice import transport_offers
from proto.control import Peer
from proto.ids import Epoch, WorkerId
from tests.support.handoff import CHOICES, SHARED_LAYOUT, Ear, SharedStore, make_fence, make_offer


async def connect(peer: Peer) -> Link:
    return await grpc_link.connect(peer.address)


async def main(address: str, epoch: str, num_blocks: int) -> None:
    store, ear = SharedStore(num_blocks, SHARED_LAYOUT), Ear()
    offer = make_offer(
        num_blocks,
        fence=make_fence(decode=epoch),
        layout=SHARED_LAYOUT,
        transports=transport_offers(("auto",), store),
    )
    session = SendSession(offer, store, connect, Peer(WorkerId("d"), Epoch(epoch), address), ear)
    session.blocks_ready(0, store.fill(offer))
    session.seal(num_blocks, SHARED_LAYOUT.block_size, CHOICES)
    await session.run()
    sys.stdout.write(f"{ear.transport} {' '.join(ear.told)}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    store.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
