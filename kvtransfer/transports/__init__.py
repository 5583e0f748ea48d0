"""How payloads get from P's memory into D's: what P can offer, and what D can use of it.

Inside the frame (``grpc``, and ``memory`` within one process), or read by D from memory that P exports (``shm``).
D takes the first way offered that it is allowed, and that it has proved to work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvtransfer.transport import BlockStore
from proto.errors import RemoteProtocolError
from proto.handoff import Located, Offer, TransportOffer
from proto.ids import BlockId, Epoch
from proto.layout import KvLayout

GRPC = "grpc"
MEMORY = "memory"
SHM = "shm"
AUTO = "auto"

Payload = bytes | memoryview | Located


class PayloadSource(Protocol):
    """Where the payloads of one hand-off come from, on D's side."""

    def fetch(self, payload: Payload) -> bytes | memoryview:
        """The block's bytes, without a copy where that is possible; valid until ``close``.

        Called from any thread. Raises RemoteProtocolError where the payload points nowhere.
        """

    def close(self) -> None: ...


class PayloadReader(Protocol):
    """D's side of one way to move payloads."""

    @property
    def name(self) -> str: ...

    def open(self, detail: bytes, epoch: Epoch, layout: KvLayout) -> PayloadSource | None:
        """A source for one hand-off from the P of ``epoch``; None where this way does not work with it."""

    def close(self) -> None:
        """Gives up what is cached. Sources that are open stay good until they are closed."""


class PayloadWriter(Protocol):
    """P's side: what a frame carries for a block."""

    def payload(self, block: BlockId) -> Payload: ...


class InlineReader:
    """Payloads come inside the frames."""

    def __init__(self, name: str) -> None:
        self.name = name

    def open(self, detail: bytes, epoch: Epoch, layout: KvLayout) -> PayloadSource:
        return _InlineSource()

    def close(self) -> None:
        """Nothing is cached."""


class _InlineSource:
    def fetch(self, payload: Payload) -> bytes | memoryview:
        if isinstance(payload, Located):
            raise RemoteProtocolError("a frame without its payload")
        return payload

    def close(self) -> None:
        """Nothing is held."""


class InlineWriter:
    """The block itself; on CPU a view without a copy."""

    def __init__(self, store: BlockStore) -> None:
        self._store = store

    def payload(self, block: BlockId) -> Payload:
        return self._store.read(block)


class LocatedWriter:
    """The block's place in the exported memory."""

    def __init__(self, store: BlockStore) -> None:
        self._block_bytes = store.layout.block_bytes

    def payload(self, block: BlockId) -> Payload:
        return Located(block * self._block_bytes)


def writer(name: str, store: BlockStore) -> PayloadWriter:
    return LocatedWriter(store) if name == SHM else InlineWriter(store)


def choose(offer: Offer, readers: Sequence[PayloadReader], layout: KvLayout) -> tuple[str, PayloadSource] | None:
    """The first transport offered that one of ``readers`` can use; None where there is none."""
    by_name = {reader.name: reader for reader in readers}
    for transport in offer.transports:
        reader = by_name.get(transport.name)
        if reader is None:
            continue
        source = reader.open(transport.detail, offer.fence.prefill_epoch, layout)
        if source is not None:
            return transport.name, source
    return None


def inline_offers(*names: str) -> tuple[TransportOffer, ...]:
    return tuple(TransportOffer(name) for name in names)
