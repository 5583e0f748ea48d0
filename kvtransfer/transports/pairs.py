"""What P and D say about the communicator between them, on a gRPC stream of its own: D asks, P sends what is asked for.

    D ── Join ──────────▶ P      who is meant, and how the ring is cut
    D ◀── Opened ──────── P      where to meet for the communicator; or Refused, and the stream ends
    D ── Fetch(blocks) ─▶ P      P then sends these blocks, in this order, and no others: NCCL's messages have no tags
    D ── FetchNonce ────▶ P      P sends its nonce

The stream lives as long as the communicator: its end is the news of the peer's death, and ends the other.
Knows bytes and messages; knows nothing of GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgpack

from proto.errors import RemoteProtocolError
from proto.ids import BlockId, Epoch
from proto.layout import WIRE_VERSION
from proto.wire.envelope import check_version

SERVICE = "tandem.Pairs"
METHOD = "Exchange"


@dataclass(frozen=True, slots=True)
class Join:
    """The two incarnations, the blocks' layout, and how many blocks a message carries at most."""

    prefill_epoch: Epoch
    decode_epoch: Epoch
    layout: str
    slots: int


@dataclass(frozen=True, slots=True)
class FetchNonce:
    pass


@dataclass(frozen=True, slots=True)
class Fetch:
    blocks: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class Opened:
    """P listens at ``port`` of the host that D has reached."""

    port: int


@dataclass(frozen=True, slots=True)
class Refused:
    reason: str


FromD = Join | FetchNonce | Fetch
FromP = Opened | Refused


def encode_from_d(message: FromD) -> bytes:
    match message:
        case Join(prefill_epoch, decode_epoch, layout, slots):
            return _pack("join", prefill_epoch, decode_epoch, layout, slots)
        case FetchNonce():
            return _pack("nonce")
        case Fetch(blocks):
            return _pack("fetch", blocks)


def decode_from_d(data: bytes) -> FromD:
    """Raises RemoteProtocolError."""
    match _unpack(data):
        case ["join", str(prefill_epoch), str(decode_epoch), str(layout), int(slots), *_] if slots > 0:
            return Join(Epoch(prefill_epoch), Epoch(decode_epoch), layout, slots)
        case ["nonce", *_]:
            return FetchNonce()
        case ["fetch", list(blocks), *_] if all(type(block) is int and block >= 0 for block in blocks):
            return Fetch(tuple(blocks))
        case _:
            raise RemoteProtocolError("no message from a decode worker to its pair")


def encode_from_p(message: FromP) -> bytes:
    match message:
        case Opened(port):
            return _pack("opened", port)
        case Refused(reason):
            return _pack("refused", reason)


def decode_from_p(data: bytes) -> FromP:
    """Raises RemoteProtocolError."""
    match _unpack(data):
        case ["opened", int(port), *_] if 0 < port < 1 << 16:
            return Opened(port)
        case ["refused", str(reason), *_]:
            return Refused(reason)
        case _:
            raise RemoteProtocolError("no message from a prefill worker to its pair")


def _pack(*fields: object) -> bytes:
    packed: bytes = msgpack.packb([WIRE_VERSION, *fields])
    return packed


def _unpack(data: bytes) -> list[object]:
    """The fields after the version; a newer one may append some."""
    try:
        fields = msgpack.unpackb(data)
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise RemoteProtocolError(f"a malformed message to a pair: {error!r}") from error
    if not isinstance(fields, list) or not fields or type(fields[0]) is not int:
        raise RemoteProtocolError("a message to a pair without a version")
    check_version(fields[0])
    return fields[1:]
