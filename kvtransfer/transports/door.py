"""P's side of ``nccl``: decode workers join by a gRPC stream, ask for blocks of P's KV memory, and are sent them.

One stream and one communicator per decode worker; when it comes again, the new one replaces the old. The least recently
used one that sends nothing goes where there would be too many. P sends what it is asked for, whatever those blocks hold
by then: their checksums say whether they are still what was promised.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TypeVar

import grpc
import grpc.aio

from kvtransfer import fences
from kvtransfer.tasks import in_thread
from kvtransfer.transport import BlockStore, DeviceBlocks
from kvtransfer.transports.nccl import JOIN_S, MAX_PAIRS, abort_soon
from kvtransfer.transports.pairs import (
    METHOD,
    SERVICE,
    Fetch,
    FetchNonce,
    FromD,
    FromP,
    Join,
    Opened,
    Refused,
    decode_from_d,
    encode_from_p,
)
from kvtransfer.transports.ring import D_RANK, P_RANK, Groups, Ring, RingBroken, listen, nccl_group
from proto.errors import RemoteProtocolError
from proto.ids import Epoch
from service.rpc import Duplex, StreamClosed

log = logging.getLogger(__name__)
T = TypeVar("T")
Visit = Duplex[FromD, FromP]


class NcclDoor:
    """``store`` is asked for when the first decode worker comes. ``epoch``: our own. ``refusals``: where to count."""

    def __init__(
        self,
        epoch: Epoch,
        store: Callable[[], BlockStore],
        refusals: fences.Refusals | None = None,
        *,
        groups: Groups = nccl_group,
        max_pairs: int = MAX_PAIRS,
    ) -> None:
        self._epoch = epoch
        self._store = store
        self._refusals = fences.Refusals() if refusals is None else refusals
        self._groups = groups
        self._max_pairs = max_pairs
        self._visits: dict[Epoch, _Visitor] = {}
        """The least recently used first."""

    @property
    def num_pairs(self) -> int:
        return len(self._visits)

    def handler(self) -> grpc.GenericRpcHandler:
        """The service that decode workers find at this worker's address."""
        return grpc.method_handlers_generic_handler(
            SERVICE, {METHOD: grpc.stream_stream_rpc_method_handler(self._exchange)}
        )

    async def _exchange(self, _requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        async def read() -> bytes | None:
            data = await context.read()
            return data if isinstance(data, bytes) else None

        peer = f"decode worker at {context.peer()}"
        duplex: Visit = Duplex(peer, read, context.write, encode_from_p, decode_from_d, on_malformed=self._malformed)
        duplex.start()
        try:
            async with asyncio.timeout(JOIN_S):
                join = await duplex.receive()
            await self._admit(join, duplex)
            await duplex.flush()
        except (StreamClosed, TimeoutError):
            pass
        except (RemoteProtocolError, RingBroken) as error:
            if isinstance(error, RemoteProtocolError):
                self._malformed()
            log.warning("a communicator with a %s has ended: %s", peer, error)
        except Exception:
            log.exception("a communicator with a %s ended by an error of ours", peer)
        finally:
            await duplex.aclose("the prefill worker ended the stream")

    async def _admit(self, join: FromD, duplex: Visit) -> None:
        if not isinstance(join, Join):
            raise RemoteProtocolError(f"{type(join).__name__} where Join comes first")
        store = self._store()
        device = store.on_device()
        if join.prefill_epoch != self._epoch:
            self._refusals.add(fences.Refused.FOREIGN_EPOCH)
            duplex.send(Refused("another process had this address"))
        elif device is None or join.layout != store.layout.fingerprint():
            duplex.send(Refused(f"blocks here are: {store.layout.describe()}, {'on a GPU' if device else 'on a CPU'}"))
        elif not self._make_room(join.decode_epoch):
            duplex.send(Refused(f"{self._max_pairs} communicators are in use, as many as there may be"))
        else:
            visitor = self._visits[join.decode_epoch] = _Visitor(duplex, device, join.slots, store.layout.block_bytes)
            try:
                await visitor.serve(self._groups, lambda: self._used(join.decode_epoch))
            finally:
                if self._visits.get(join.decode_epoch) is visitor:
                    del self._visits[join.decode_epoch]

    def _malformed(self) -> None:
        self._refusals.add(fences.Refused.MALFORMED)

    def _make_room(self, newcomer: Epoch) -> bool:
        older = self._visits.pop(newcomer, None)
        if older is not None:
            older.dismiss("the decode worker has come again")
        if len(self._visits) < self._max_pairs:
            return True
        idle = next((epoch for epoch, visitor in self._visits.items() if not visitor.is_busy), None)
        if idle is None:
            return False
        self._visits.pop(idle).dismiss("it was used least recently")
        return True

    def _used(self, epoch: Epoch) -> None:
        if epoch in self._visits:
            self._visits[epoch] = self._visits.pop(epoch)


class _Visitor:
    """One decode worker, from Join to the end of its stream."""

    def __init__(self, duplex: Visit, device: DeviceBlocks, slots: int, block_bytes: int) -> None:
        self.is_busy = True
        self._duplex = duplex
        self._device = device
        self._slots = slots
        self._block_bytes = block_bytes

    def dismiss(self, reason: str) -> None:
        self._duplex.end(reason)

    async def serve(self, groups: Groups, on_use: Callable[[], None]) -> None:
        """Raises StreamClosed, RemoteProtocolError or RingBroken, and the communicator is over."""
        meeting = listen()
        self._duplex.send(Opened(meeting.port))

        def connect() -> Ring:
            return Ring(groups(meeting, P_RANK), D_RANK, self._device, self._slots, self._block_bytes)

        async with asyncio.timeout(JOIN_S):
            ring = await self._unless_ended(in_thread(connect, too_late=abort_soon))
        try:
            while True:
                self.is_busy = False
                message = await self._duplex.receive()
                self.is_busy = True
                on_use()
                await self._unless_ended(in_thread(partial(self._answer, ring, message)))
        finally:
            abort_soon(ring)

    def _answer(self, ring: Ring, message: FromD) -> None:
        match message:
            case Fetch(blocks):
                num_blocks = self._device.memory.numel() // self._block_bytes
                if max(blocks, default=0) >= num_blocks:
                    raise RemoteProtocolError(f"block {max(blocks)} was asked for, of {num_blocks}")
                ring.send(blocks)
            case FetchNonce():
                ring.send_bytes(self._device.memory[-len(self._device.nonce) :])
            case Join():
                raise RemoteProtocolError("Join, twice")

    async def _unless_ended(self, work: Awaitable[T]) -> T:
        """Raises StreamClosed as soon as the stream ends."""
        working = asyncio.ensure_future(work)
        ending = asyncio.ensure_future(self._duplex.wait_ended())
        try:
            await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise StreamClosed("the decode worker has left")
            return working.result()
        finally:
            working.cancel()
            ending.cancel()
