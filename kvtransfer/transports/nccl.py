"""Payloads between the GPUs of two hosts: D asks, P sends, and what arrives lands in a ring, from which D copies.

Frames carry places instead of bytes, as with ``shm``. D fetches the blocks at those places, many at a time, over the
one communicator that it has with P (``ring``), and says so first on gRPC (``pairs``). A communicator is used once it
has brought P's nonce. It is made when it is first wanted, and again when it has failed; the least recently used one
goes where there would be too many; and each ends with either process. P's side is ``door``.

What travels is not encrypted. Unverified over NCCL itself: see ``ring``.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial

import grpc.aio
import msgpack

from kvtransfer.tasks import in_thread
from kvtransfer.transport import BlockStore, DeviceBlocks
from kvtransfer.transports import NCCL, detail_fields
from kvtransfer.transports.device import BATCH_BYTES, PeerSource
from kvtransfer.transports.pairs import (
    METHOD,
    SERVICE,
    Fetch,
    FetchNonce,
    FromD,
    FromP,
    Join,
    Opened,
    decode_from_p,
    encode_from_d,
)
from kvtransfer.transports.ring import D_RANK, P_RANK, Groups, Ring, RingBroken, meet, nccl_group, num_slots
from proto.errors import RemoteProtocolError
from proto.handoff import TransportOffer
from proto.ids import BlockId, Epoch
from proto.layout import KvLayout
from service.address import split_address
from service.rpc import Duplex, StreamClosed, TlsFiles, channel

log = logging.getLogger(__name__)

MAX_PAIRS = 8
"""Communicators of one process: each has a ring, and NCCL's own buffers."""
JOIN_S = 15.0
"""What making one may take, all in all."""
AGAIN_S = 300.0
"""After a failure to make one, other ways are taken for so long."""


@dataclass(frozen=True, slots=True)
class NcclOffer:
    """P's gRPC address, the size of its memory in blocks, and the nonce behind the last one."""

    address: str
    num_blocks: int
    nonce: bytes


def nccl_offer(device: DeviceBlocks, layout: KvLayout, address: str) -> TransportOffer:
    """What P says of its memory."""
    num_blocks = device.memory.numel() // layout.block_bytes
    return TransportOffer(NCCL, msgpack.packb(astuple(NcclOffer(address, num_blocks, device.nonce))))


def read_offer(detail: bytes) -> NcclOffer | None:
    """What D understands of it; None where that is nothing."""
    match detail_fields(detail, 3):
        case [str(address), int(num_blocks), bytes(nonce)] if num_blocks > 0 and nonce:
            offer = NcclOffer(address, num_blocks, nonce)
        case _:
            return None
    try:
        split_address(address)
    except ValueError:
        return None
    return offer


class NcclReader:
    """D's communicators. ``epoch``: our own."""

    name = NCCL

    def __init__(
        self,
        epoch: Epoch,
        tls: TlsFiles | None = None,
        *,
        groups: Groups = nccl_group,
        max_pairs: int = MAX_PAIRS,
    ) -> None:
        self._epoch = epoch
        self._tls = tls
        self._groups = groups
        self._max_pairs = max_pairs
        self._peers: dict[Epoch, _Peer] = {}

    @property
    def num_pairs(self) -> int:
        return sum(peer.is_joined for peer in self._peers.values())

    async def open(self, detail: bytes, epoch: Epoch, store: BlockStore) -> PeerSource | None:
        device, offer = store.on_device(), read_offer(detail)
        if device is None or offer is None:
            return None
        peer = self._peers.get(epoch) or self._admit(epoch, offer, device, store.layout)
        if peer is None:
            return None
        peer.take()
        try:
            if await peer.joined() is not None:
                return PeerSource(peer, BATCH_BYTES)
        finally:
            peer.give_back()
        return None

    def close(self) -> None:
        for peer in self._peers.values():
            peer.leave("the decode worker stops")
        self._peers.clear()

    def _admit(self, epoch: Epoch, offer: NcclOffer, device: DeviceBlocks, layout: KvLayout) -> _Peer | None:
        """None where all there may be are in use."""
        if len(self._peers) >= self._max_pairs:
            idle = [(peer.last_used, each) for each, peer in self._peers.items() if not peer.num_users]
            if not idle:
                return None
            _, oldest = min(idle)
            self._peers.pop(oldest).leave("it was used least recently")
        join = Join(epoch, self._epoch, layout.fingerprint(), num_slots(layout.block_bytes))
        peer = self._peers[epoch] = _Peer(
            offer, join, device, layout.block_bytes, self._tls, self._groups, on_idle=lambda: self._forget(epoch)
        )
        return peer

    def _forget(self, epoch: Epoch) -> None:
        peer = self._peers.pop(epoch, None)
        if peer is not None:
            peer.leave("nobody uses it")


class _Peer:
    """One incarnation of P, and the communicator with it while there is one."""

    def __init__(
        self,
        offer: NcclOffer,
        join: Join,
        device: DeviceBlocks,
        block_bytes: int,
        tls: TlsFiles | None,
        groups: Groups,
        on_idle: Callable[[], None],
    ) -> None:
        self.offer = offer
        self.num_users = 0
        self.last_used = 0.0
        self._join = join
        self._device = device
        self._block_bytes = block_bytes
        self._tls = tls
        self._groups = groups
        self._on_idle = on_idle
        """Called when the communicator has ended and nobody uses it."""
        self._pair: _Pair | None = None
        self._joining = asyncio.Lock()
        self._fetching = asyncio.Lock()
        self._not_before = 0.0

    @property
    def num_blocks(self) -> int:
        return self.offer.num_blocks

    @property
    def is_joined(self) -> bool:
        return self._pair is not None and self._pair.is_alive

    def take(self) -> None:
        self.num_users += 1

    def give_back(self) -> None:
        self.num_users -= 1
        self.last_used = time.monotonic()
        if self._pair is not None:
            self._ended()

    def _ended(self) -> None:
        if not self.num_users and not self.is_joined:
            self._on_idle()

    async def joined(self) -> _Pair | None:
        """The communicator, made where there is none. None where there cannot be one, for now."""
        async with self._joining:
            if self._pair is not None and self._pair.is_alive:
                return self._pair
            self.leave("it has failed")
            if time.monotonic() < self._not_before:
                return None
            self._pair = await self._make()
            if self._pair is None:
                self._not_before = time.monotonic() + AGAIN_S
            return self._pair

    def leave(self, reason: str) -> None:
        """Ends the communicator. May be called twice."""
        pair, self._pair = self._pair, None
        if pair is not None:
            pair.end(reason)

    async def fetch(self, theirs: Sequence[int], ours: Sequence[BlockId]) -> bool:
        """P's blocks into ours; False where that failed. Raises DeviceLost."""
        async with self._fetching:
            pair = await self.joined()
            if pair is None:
                return False
            pair.ask(Fetch(tuple(map(BlockId, theirs))))
            try:
                await in_thread(partial(pair.ring.receive, ours))
            except RingBroken as broken:
                log.warning("the communicator with %s has failed: %s", self.offer.address, broken)
                return False
        return True

    async def _make(self) -> _Pair | None:
        stream = _Stream(self.offer.address, self._tls)
        try:
            async with asyncio.timeout(JOIN_S):
                ring = await self._make_ring(stream)
        except (TimeoutError, StreamClosed, RemoteProtocolError, RingBroken, RuntimeError) as error:
            log.warning("no communicator with the prefill worker at %s: %s", self.offer.address, error or "no answer")
            stream.end("no communicator")
            return None
        except BaseException:
            stream.end("no communicator")
            raise
        return _Pair(stream, ring, self._ended)

    async def _make_ring(self, stream: _Stream) -> Ring:
        stream.duplex.send(self._join)
        answer = await stream.duplex.receive()
        if not isinstance(answer, Opened):
            raise RemoteProtocolError(f"it refused: {answer.reason}")
        ring = await in_thread(partial(self._connect, answer.port), too_late=abort_soon)
        try:
            stream.duplex.send(FetchNonce())
            nonce = await in_thread(partial(ring.receive_bytes, len(self.offer.nonce)))
            if nonce != self.offer.nonce:
                raise RemoteProtocolError("it is another process than the one that made the offer")
        except BaseException:
            abort_soon(ring)
            raise
        return ring

    def _connect(self, port: int) -> Ring:
        host, _ = split_address(self.offer.address)
        group = self._groups(meet(host, port), D_RANK)
        return Ring(group, P_RANK, self._device, self._join.slots, self._block_bytes)


class _Stream:
    """The gRPC stream beside a communicator."""

    def __init__(self, address: str, tls: TlsFiles | None) -> None:
        self._channel = channel(address, tls)
        self._call: grpc.aio.StreamStreamCall[bytes, bytes] = self._channel.stream_stream(f"/{SERVICE}/{METHOD}")()
        self.duplex: Duplex[FromP, FromD] = Duplex(
            f"prefill worker at {address}", self._read, self._write, encode_from_d, decode_from_p
        )
        self.duplex.start()
        self._closing: asyncio.Task[None] | None = None

    def end(self, reason: str) -> None:
        self.duplex.end(reason)
        self._call.cancel()
        self._closing = asyncio.create_task(self._channel.close())

    async def _read(self) -> bytes | None:
        data = await self._call.read()
        return data if isinstance(data, bytes) else None

    async def _write(self, data: bytes) -> None:
        await self._call.write(data)


class _Pair:
    """A communicator that has proved itself, and its stream: the end of one is the end of the other."""

    def __init__(self, stream: _Stream, ring: Ring, on_end: Callable[[], None]) -> None:
        self.ring = ring
        self._stream = stream
        self._on_end = on_end
        self._watching = asyncio.create_task(self._watch())

    @property
    def is_alive(self) -> bool:
        return not self.ring.is_over and not self._stream.duplex.is_ended

    def ask(self, message: FromD) -> None:
        self._stream.duplex.send(message)

    def end(self, reason: str) -> None:
        self._stream.end(reason)

    async def _watch(self) -> None:
        await self._stream.duplex.wait_ended()
        abort_soon(self.ring)
        self._on_end()


def abort_soon(ring: Ring) -> None:
    """In a thread: the library may take its time."""
    threading.Thread(target=ring.abort, name="abort", daemon=True).start()
