"""How payloads get from P's memory into D's: what P can offer, and what D can use of it.

    inside the frame        ``grpc``, and ``memory`` within one process
    read by D, from P's     ``shm`` (CPUs of one host), ``cuda_ipc`` (GPUs of one host), ``nccl`` (GPUs of two),
                            ``nixl`` (whatever its library reaches)

Whatever the way, only D writes D's memory, and P's is only read. D takes the first way offered that it is allowed, and
that it has proved to work: it has read a nonce of P's through it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgpack

from kvtransfer.tasks import off_loop
from kvtransfer.transport import BlockStore
from proto.errors import RemoteProtocolError
from proto.handoff import Located, Offer, TransportOffer
from proto.ids import BlockId, Epoch

GRPC = "grpc"
MEMORY = "memory"
SHM = "shm"
CUDA_IPC = "cuda_ipc"
NCCL = "nccl"
NIXL = "nixl"
AUTO = "auto"
READ_BY_D = frozenset({SHM, CUDA_IPC, NCCL, NIXL})

HOST_BATCH_BYTES = 8 << 20
"""How much the CPU best copies at a time: some milliseconds' work."""

Payload = bytes | memoryview | Located


class PayloadSource(Protocol):
    """Where the payloads of one hand-off come from, on D's side."""

    @property
    def batch_bytes(self) -> int:
        """How much is best placed in one call."""

    async def place(self, payloads: Sequence[Payload], blocks: Sequence[BlockId], store: BlockStore) -> list[bool]:
        """Copies each payload into the block of ``store`` beside it; returns when the bytes are there.

        False for those that could not be had: as useless as damaged ones. Not to be cancelled. Raises DeviceLost.
        """

    def close(self) -> None:
        """Nothing is being placed any more. May be called twice."""


class PayloadReader(Protocol):
    """D's side of one way to move payloads. For one event loop."""

    @property
    def name(self) -> str: ...

    async def open(self, detail: bytes, epoch: Epoch, store: BlockStore) -> PayloadSource | None:
        """A source for one hand-off from the P of ``epoch``; None where this way does not work with it."""

    def close(self) -> None:
        """Gives up what is cached. Sources that are open stay good until they are closed."""


class PayloadWriter(Protocol):
    """P's side: what frames carry."""

    @property
    def batch_bytes(self) -> int:
        """How much is best asked for in one call; one block at least."""

    async def payloads(self, blocks: Sequence[BlockId]) -> list[Payload]:
        """For each block. Cancelled, it ends once nothing is read any more. Raises DeviceLost."""


class InlineReader:
    """Payloads come inside the frames."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def open(self, detail: bytes, epoch: Epoch, store: BlockStore) -> PayloadSource:
        return _InlineSource()

    def close(self) -> None:
        """Nothing is cached."""


class _InlineSource:
    batch_bytes = HOST_BATCH_BYTES

    async def place(self, payloads: Sequence[Payload], blocks: Sequence[BlockId], store: BlockStore) -> list[bool]:
        return await place_each(_inline, payloads, blocks, store)

    def close(self) -> None:
        """Nothing is held."""


def _inline(payload: Payload) -> bytes | memoryview:
    if isinstance(payload, Located):
        raise RemoteProtocolError("a frame without its payload")
    return payload


async def place_each(
    fetch: Callable[[Payload], bytes | memoryview],
    payloads: Sequence[Payload],
    blocks: Sequence[BlockId],
    store: BlockStore,
) -> list[bool]:
    """``PayloadSource.place`` for bytes that the CPU sees; ``fetch`` raises RemoteProtocolError if there are none."""

    def place_all() -> list[bool]:
        return [_place_one(fetch, payload, block, store) for payload, block in zip(payloads, blocks, strict=True)]

    return await off_loop(place_all, len(blocks) * store.layout.block_bytes)


def _place_one(
    fetch: Callable[[Payload], bytes | memoryview], payload: Payload, block: BlockId, store: BlockStore
) -> bool:
    try:
        store.write(block, fetch(payload))
    except RemoteProtocolError:
        return False
    return True


def located_block(payload: Payload, block_bytes: int, num_blocks: int) -> int:
    """Which of P's blocks a frame points at. Raises RemoteProtocolError where it points at none."""
    if not isinstance(payload, Located):
        raise RemoteProtocolError("a payload inside a frame, where it was agreed that D reads it")
    block, rest = divmod(payload.offset, block_bytes)
    if rest or block >= num_blocks:
        raise RemoteProtocolError(f"no block lies at {payload.offset} of the peer's memory")
    return block


class InlineWriter:
    """The block itself, in memory that ``read`` shows without a copy."""

    batch_bytes = 0

    def __init__(self, store: BlockStore) -> None:
        self._store = store

    async def payloads(self, blocks: Sequence[BlockId]) -> list[Payload]:
        return [self._store.read(block) for block in blocks]


class CopiedWriter:
    """The block itself, which ``read`` first waits for and copies: not on the event loop, and several at a time."""

    batch_bytes = HOST_BATCH_BYTES

    def __init__(self, store: BlockStore) -> None:
        self._store = store

    async def payloads(self, blocks: Sequence[BlockId]) -> list[Payload]:
        def read_all() -> list[Payload]:
            return [self._store.read(block) for block in blocks]

        return await off_loop(read_all, len(blocks) * self._store.layout.block_bytes)


class LocatedWriter:
    """The block's place in P's memory."""

    batch_bytes = 0

    def __init__(self, store: BlockStore) -> None:
        self._block_bytes = store.layout.block_bytes

    async def payloads(self, blocks: Sequence[BlockId]) -> list[Payload]:
        return [Located(block * self._block_bytes) for block in blocks]


def writer(name: str, store: BlockStore) -> PayloadWriter:
    if name in READ_BY_D:
        return LocatedWriter(store)
    return InlineWriter(store) if store.on_device() is None else CopiedWriter(store)


async def choose(offer: Offer, readers: Sequence[PayloadReader], store: BlockStore) -> tuple[str, PayloadSource] | None:
    """The first transport offered that one of ``readers`` can use; None where there is none."""
    by_name = {reader.name: reader for reader in readers}
    for transport in offer.transports:
        reader = by_name.get(transport.name)
        if reader is None:
            continue
        source = await reader.open(transport.detail, offer.fence.prefill_epoch, store)
        if source is not None:
            return transport.name, source
    return None


def inline_offers(*names: str) -> tuple[TransportOffer, ...]:
    return tuple(TransportOffer(name) for name in names)


def detail_fields(detail: bytes, count: int) -> list[Any] | None:
    """The first ``count`` fields of an offer's detail, of whatever types; None where it has not so many. A newer
    version may have put more behind them."""
    try:
        fields = msgpack.unpackb(detail)
    except (ValueError, msgpack.UnpackException):
        return None
    return fields[:count] if isinstance(fields, list) and len(fields) >= count else None
