"""A prefill worker with a made-up GPU in a process of its own: one prompt, one hand-off over gRPC.

    python -m tests.support.gpu_sender ADDRESS WAY NUM_BLOCKS

WAY: cuda_ipc, by a driver that is a file, or nccl, by Gloo. Prints the transport that was chosen and how it ended; then
lives until its standard input is closed. ``--keep`` seals nothing: the hand-off stays open.
"""

from __future__ import annotations

import asyncio
import sys

from kvtransfer.session import SendSession
from kvtransfer.transport import Link
from kvtransfer.transports import grpc as grpc_link
from kvtransfer.transports import inline_offers
from kvtransfer.transports.cuda_ipc import cuda_ipc_offer
from kvtransfer.transports.door import NcclDoor
from kvtransfer.transports.nccl import nccl_offer
from proto.control import Peer
from proto.handoff import TransportOffer
from proto.ids import Epoch, WorkerId
from service.rpc import serve
from tests.support.device import NONCE, DeviceStore, FakeDriver, gloo_group
from tests.support.handoff import CHOICES, SHARED_LAYOUT, Ear, make_fence, make_offer


async def connect(peer: Peer) -> Link:
    return await grpc_link.connect(peer.address)


async def main(address: str, way: str, num_blocks: int, keep: bool) -> None:
    driver, ear = FakeDriver(), Ear()
    memory = driver.allocate(num_blocks * SHARED_LAYOUT.block_bytes + len(NONCE))
    store = DeviceStore(num_blocks, SHARED_LAYOUT, memory=memory)
    door = NcclDoor(Epoch("p"), lambda: store, groups=gloo_group)
    server, port = await serve("127.0.0.1", 0, [door.handler()])
    offers: dict[str, TransportOffer] = {
        "cuda_ipc": cuda_ipc_offer(driver, store.blocks),
        "nccl": nccl_offer(store.blocks, SHARED_LAYOUT, f"127.0.0.1:{port}"),
    }
    transports = (offers[way], *inline_offers("grpc"))
    offer = make_offer(num_blocks, fence=make_fence(), layout=SHARED_LAYOUT, transports=transports)
    session = SendSession(offer, store, connect, Peer(WorkerId("d"), Epoch("d"), address), ear)
    session.blocks_ready(0, store.fill(offer))
    if not keep:
        session.seal(num_blocks, SHARED_LAYOUT.block_size, CHOICES)
    running = asyncio.create_task(session.run())
    await ear.until("granted" if keep else "released")
    sys.stdout.write(f"{ear.transport} {' '.join(ear.told)}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    running.cancel()
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), "--keep" in sys.argv[4:]))
