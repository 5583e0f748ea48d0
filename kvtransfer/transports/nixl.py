"""Payloads by NVIDIA's transfer library: D reads the memory that P has registered, by RDMA or whatever else UCX finds.

Frames carry places instead of bytes, as with ``shm``; a batch of them is one READ. P does nothing, and D uses this once
it has read P's nonce through it. What is read lands beside D's blocks and is copied into them (``nixl_landing``), so a
READ that comes late spoils none.

An incarnation of P that failed is left alone for a while: other ways are taken. One that nobody uses is let go of.
What travels is not encrypted, and UCX asks nobody who he is. Unverified over RDMA and on GPUs.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple
from functools import partial

import msgpack
import numpy as np
from torch import Tensor

from kvtransfer.tasks import in_thread, off_loop
from kvtransfer.transport import BlockStore
from kvtransfer.transports import NIXL, detail_fields
from kvtransfer.transports.device import PeerSource
from kvtransfer.transports.nixl_landing import (
    DRAM,
    LANDING_BYTES,
    MAX_METADATA_BYTES,
    MAX_NONCE_BYTES,
    VRAM,
    Agent,
    Connection,
    NixlBroken,
    NixlOffer,
    NixlUnavailable,
    Region,
    region_of,
)
from proto.handoff import TransportOffer
from proto.ids import BlockId, Epoch

log = logging.getLogger(__name__)

MAX_PEERS = 8
MEET_S = 5.0
"""What it may take to meet a peer and read its nonce."""
STALL_S = 10.0
"""A READ that takes longer is given up, and the peer with it."""
AGAIN_S = 300.0
"""After a failure, other ways are taken for so long."""
IDLE_S = 60.0
"""A peer that nobody uses is kept for so long."""


def nixl_offer(agent: Agent, store: BlockStore) -> TransportOffer:
    """What P says of its memory. Raises NixlUnavailable."""
    device, export = store.on_device(), store.export()
    if device is not None:
        memory, nonce = region_of(device.memory), device.nonce
    elif export is not None:
        # What is exported is one piece that begins with block 0 and ends with the nonce; a read is a view of it.
        address = np.frombuffer(store.read(BlockId(0)), np.uint8).ctypes.data
        memory, nonce = Region(address, export.num_bytes, DRAM, 0), export.nonce
    else:
        raise NixlUnavailable("this worker's memory is neither a file nor a GPU's")
    offer = NixlOffer(agent.share(memory), memory.address, memory.num_bytes, memory.kind, memory.device, nonce)
    return TransportOffer(NIXL, msgpack.packb(astuple(offer)))


def read_offer(detail: bytes) -> NixlOffer | None:
    """What D understands of it; None where that is nothing."""
    fields = detail_fields(detail, 6)
    if fields is None:
        return None
    metadata, address, num_bytes, kind, device, nonce = fields
    if not all(type(number) is int and number >= 0 for number in (address, num_bytes, device)):
        return None
    if not all(isinstance(text, bytes) and text for text in (metadata, nonce)) or kind not in (DRAM, VRAM):
        return None
    if len(metadata) > MAX_METADATA_BYTES or len(nonce) > MAX_NONCE_BYTES:
        return None
    if len(nonce) > num_bytes or address + num_bytes >= 1 << 64 or device >= 1 << 16:
        return None
    return NixlOffer(metadata, address, num_bytes, kind, device, nonce)


class NixlReader:
    """D's agent and the peers it has met. For one event loop."""

    name = NIXL

    def __init__(
        self, agent: Agent, *, max_peers: int = MAX_PEERS, stall_s: float = STALL_S, idle_s: float = IDLE_S
    ) -> None:
        self._agent = agent
        self._max_peers = max_peers
        self._stall_s = stall_s
        self._idle_s = idle_s
        self._peers: dict[Epoch, _Peer] = {}
        self._admitting = asyncio.Lock()

    @property
    def num_peers(self) -> int:
        return len(self._peers)

    async def open(self, detail: bytes, epoch: Epoch, store: BlockStore) -> PeerSource | None:
        offer = read_offer(detail)
        if offer is None:
            return None
        async with self._admitting:
            peer = self._peers.get(epoch) or await self._admit(epoch, offer, store)
        if peer is None:
            return None
        peer.take()
        try:
            if await peer.connected() is not None:
                return PeerSource(peer, LANDING_BYTES)
        finally:
            peer.give_back()
        return None

    def forget(self, epoch: Epoch) -> None:
        """That incarnation is over. Its connection ends with the last source that uses it. May be called twice."""
        peer = self._peers.pop(epoch, None)
        if peer is not None:
            peer.retire()

    def close(self) -> None:
        for epoch in list(self._peers):
            self.forget(epoch)

    async def _admit(self, epoch: Epoch, offer: NixlOffer, store: BlockStore) -> _Peer | None:
        """None where all there may be are in use."""
        while len(self._peers) >= self._max_peers:
            idle = [(peer.last_used, each) for each, peer in self._peers.items() if peer.is_idle]
            if not idle:
                return None
            _, oldest = min(idle)
            await self._peers[oldest].left()
            if self._peers[oldest].is_idle:
                self.forget(oldest)
        peer = self._peers[epoch] = _Peer(
            self._agent, offer, store, self._stall_s, self._idle_s, on_idle=lambda: self.forget(epoch)
        )
        return peer


class _Peer:
    """One incarnation of P, and the connection with it while there is one."""

    def __init__(
        self,
        agent: Agent,
        offer: NixlOffer,
        store: BlockStore,
        stall_s: float,
        idle_s: float,
        on_idle: Callable[[], None],
    ) -> None:
        self.num_blocks = (offer.num_bytes - len(offer.nonce)) // store.layout.block_bytes
        self.last_used = 0.0
        self._agent = agent
        self._offer = offer
        self._store = store
        self._stall_s = stall_s
        self._idle_s = idle_s
        self._on_idle = on_idle
        self._num_users = 0
        self._is_retired = False
        self._idle_timer: asyncio.TimerHandle | None = None
        self._connection: Connection | None = None
        self._ending: Connection | None = None
        self._meeting = asyncio.Lock()
        self._fetching = asyncio.Lock()
        self._not_before = 0.0

    @property
    def is_idle(self) -> bool:
        """Nobody uses it, and no late READ keeps its memory."""
        return not self._num_users and (self._ending is None or self._ending.is_over)

    def take(self) -> None:
        self._num_users += 1
        self._stop_timer()

    def give_back(self) -> None:
        self._num_users -= 1
        self.last_used = time.monotonic()
        self._settle()

    def retire(self) -> None:
        """Nobody new will use it."""
        self._is_retired = True
        self._settle()

    def _settle(self) -> None:
        self._stop_timer()
        if self._num_users:
            return
        if self._is_retired:
            self._leave()
        else:
            self._idle_timer = asyncio.get_running_loop().call_later(self._idle_s, self._idle)

    def _idle(self) -> None:
        """Forgotten once its connection has ended: no two of them at a time are with one process."""
        if self._connection is None and self.is_idle:
            self._on_idle()
        else:
            self._leave()
            self._settle()

    def _stop_timer(self) -> None:
        timer, self._idle_timer = self._idle_timer, None
        if timer is not None:
            timer.cancel()

    async def connected(self) -> Connection | None:
        """The connection, made where there is none. None where there cannot be one, for now."""
        async with self._meeting:
            if self._connection is not None:
                return self._connection
            if time.monotonic() < self._not_before or not await self._has_ended():
                return None
            device, block_bytes = self._store.on_device(), self._store.layout.block_bytes
            self._connection = Connection(self._agent, self._offer, device, block_bytes, self._stall_s)
            try:
                async with asyncio.timeout(MEET_S):
                    await in_thread(self._connection.begin)
            except (TimeoutError, NixlBroken, RuntimeError) as error:
                self._failed(f"cannot be used: {error or 'no answer'}")
            except BaseException:
                self._leave()
                raise
            return self._connection

    async def fetch(self, theirs: Sequence[int], ours: Sequence[BlockId]) -> bool:
        """P's blocks into ours; False where that failed. Raises DeviceLost."""
        async with self._fetching:
            connection = await self.connected()
            if connection is None:
                return False
            for start in range(0, len(ours), connection.slots):
                window = slice(start, start + connection.slots)
                try:
                    await in_thread(partial(connection.fetch, theirs[window]))
                except NixlBroken as broken:
                    self._failed(f"has failed: {broken}")
                    return False
                await self._copy(connection.landed, ours[window])
        return True

    async def _copy(self, landed: Tensor, ours: Sequence[BlockId]) -> None:
        device = self._store.on_device()
        if device is not None:
            await asyncio.to_thread(device.copy_in, landed, range(len(ours)), ours)
            return

        def copy_all() -> None:
            for row, block in zip(landed.numpy(), ours, strict=False):
                self._store.write(block, memoryview(row))

        await off_loop(copy_all, len(ours) * self._store.layout.block_bytes)

    async def left(self) -> None:
        """Ends the connection, which nobody uses, and waits for that."""
        self._leave()
        await self._has_ended()

    async def _has_ended(self) -> bool:
        """Whether the last connection is over, which is soon unless a READ is late."""
        return self._ending is None or self._ending.is_over or await in_thread(partial(self._ending.wait, MEET_S))

    def _failed(self, reason: str) -> None:
        log.warning("reading a prefill worker's memory by nixl %s", reason)
        self._not_before = time.monotonic() + AGAIN_S
        self._leave()

    def _leave(self) -> None:
        """Ends the connection, out of which nothing is being copied."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._ending = connection
            threading.Thread(target=connection.end, name="nixl-end", daemon=True).start()
