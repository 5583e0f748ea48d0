"""The prefill side of measured hand-offs, in a process of its own: one memory, handed over again and again.

python -m bench.gpu.sender ADDRESS DEVICE TRANSPORT COUNT LAYERS BLOCK_SIZE KV_HEADS HEAD_DIM DTYPE NUM_BLOCKS
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import Sequence

import torch

from engine.kv_memory import KvMemory
from kvtransfer.session import SendSession
from kvtransfer.transport import Link
from kvtransfer.transports import grpc as grpc_link
from kvtransfer.transports.choice import transport_offers
from proto.control import Peer
from proto.handoff import Fence, Offer, RefuseReason, SealedChoice
from proto.ids import BlockHash, BlockId, Epoch, Generation, RequestId, WorkerId
from proto.layout import KvLayout

PREFILL, DECODE = Epoch("bench-prefill"), Epoch("bench-decode")


class _Told:
    """What became of one hand-off."""

    def __init__(self) -> None:
        self.end = asyncio.get_running_loop().create_future()
        self._why = ""

    def granted(self, num_present: int, transport: str) -> None:
        self._why = "it was granted and not adopted"

    def held(self, reason: RefuseReason | str, message: str) -> None:
        self._why = f"{reason}: {message}"

    def adopted(self, num_bytes: int, duration_s: float) -> None:
        self._why = ""

    def released(self) -> None:
        self.end.set_result(self._why)


async def send(address: str, device: str, transport: str, count: int, layout: KvLayout, num_blocks: int) -> None:
    store = KvMemory(layout, num_blocks, torch.device(device))
    data = store.paged.data
    for layer in range(layout.num_layers):
        data[:, layer] = torch.randn(data[:, layer].shape, device=data.device).to(data.dtype)
    store.fence()
    blocks = [BlockId(block) for block in range(num_blocks)]
    for number in range(count):
        request = RequestId(f"bench.{number}")
        offer = Offer(
            fence=Fence(request, Generation(1), PREFILL, DECODE),
            layout=layout.fingerprint(),
            layout_text=layout.describe(),
            numerics="",
            num_tokens=num_blocks * layout.block_size,
            num_choices=1,
            hashes=tuple(
                BlockHash(hashlib.blake2b(f"{request}/{block}".encode(), digest_size=16).digest()) for block in blocks
            ),
            transports=transport_offers((transport,), store),
            lease_s=20.0,
        )
        told = _Told()
        session = SendSession(offer, store, _connect, Peer(WorkerId("bench"), DECODE, address), told)
        session.blocks_ready(0, blocks)
        session.seal(num_blocks, layout.block_size, (SealedChoice(0),))
        await session.run()
        if why := await told.end:
            sys.exit(f"hand-off {number}: {why}")


async def _connect(peer: Peer) -> Link:
    return await grpc_link.connect(peer.address)


def main(argv: Sequence[str]) -> None:
    address, device, transport, count, layers, block_size, kv_heads, head_dim, dtype, num_blocks = argv
    layout = KvLayout(int(layers), int(block_size), int(kv_heads), int(head_dim), dtype, "")
    asyncio.run(send(address, device, transport, int(count), layout, int(num_blocks)))


if __name__ == "__main__":
    main(sys.argv[1:])
