"""The messages of a hand-off, to and from bytes: protobuf for control, raw bytes for blocks.

    control   00 | checksum, u32 | HandoffEnvelope (protobuf)
    block     01 | header length, u16 | checksum, u32 | header (msgpack) | payload

    header    [wire version, request, generation, prefill epoch, decode epoch, index, checksum, offset, payload length]

One of ``offset`` (where D reads the block itself) and ``payload length`` is nil. A newer version may append
to the header. The payload has a checksum of its own, ``checksum``, which is compared where the block ends up.
"""

from __future__ import annotations

import struct

import msgpack

from proto.errors import LocalProtocolError, RemoteProtocolError
from proto.gen import tandem_pb2 as pb
from proto.handoff import (
    Ack,
    Adopted,
    Fence,
    Frame,
    Grant,
    HandoffMessage,
    Located,
    Nack,
    Offer,
    Refuse,
    RefuseReason,
    Seal,
    SealedChoice,
    Stale,
    TransportOffer,
    Withdraw,
)
from proto.hashing import HASH_BYTES
from proto.ids import BlockHash, Epoch, Generation, RequestId
from proto.layout import WIRE_VERSION
from proto.wire.envelope import (
    MAX_MESSAGE_BYTES,
    EnumCodec,
    check_version,
    given,
    has,
    our_fault,
    seal,
    seconds,
    summed,
    unseal,
    unsummed,
)

_CONTROL = 0
_FRAME = 1
_PREFIX = struct.Struct(">BH")
_HEADER_ITEMS = 9
_HEADER_BYTES = 512
"""At first; the buffer grows. By itself msgpack takes a megabyte for each message."""
_REFUSES = EnumCodec(RefuseReason, pb.RefuseReason, "REFUSE_REASON")


def encode_handoff(message: HandoffMessage) -> bytes:
    """Copies a frame's payload once, into the result."""
    if isinstance(message, Frame):
        return _encode_frame(message)
    envelope = pb.HandoffEnvelope(wire_version=WIRE_VERSION)
    with our_fault(type(message).__name__):
        envelope.fence.request = message.fence.request
        envelope.fence.generation = message.fence.generation
        envelope.fence.prefill_epoch = message.fence.prefill_epoch
        envelope.fence.decode_epoch = message.fence.decode_epoch
        _fill_body(envelope, message)
    return bytes((_CONTROL,)) + seal(envelope)


def decode_handoff(data: bytes | memoryview) -> HandoffMessage:
    """A frame's payload is a view into ``data``."""
    view = memoryview(data)
    if not view:
        raise RemoteProtocolError("an empty message")
    if view[0] == _FRAME:
        return _decode_frame(view)
    if view[0] != _CONTROL:
        raise RemoteProtocolError(f"unknown kind of message: {view[0]}")
    envelope = unseal(pb.HandoffEnvelope(), view[1:])
    has(envelope, "fence")
    given(envelope.fence, "request", "generation")
    fence = Fence(
        RequestId(envelope.fence.request),
        Generation(envelope.fence.generation),
        Epoch(envelope.fence.prefill_epoch),
        Epoch(envelope.fence.decode_epoch),
    )
    return _read_body(envelope, fence)


def _encode_frame(frame: Frame) -> bytes:
    located = isinstance(frame.payload, Located)
    payload = b"" if isinstance(frame.payload, Located) else memoryview(frame.payload).cast("B")
    packed = msgpack.packb(
        [
            WIRE_VERSION,
            frame.fence.request,
            frame.fence.generation,
            frame.fence.prefill_epoch,
            frame.fence.decode_epoch,
            frame.index,
            frame.checksum,
            frame.payload.offset if isinstance(frame.payload, Located) else None,
            None if located else len(payload),
        ],
        buf_size=_HEADER_BYTES,
    )
    header = summed(packed)
    if len(header) > 0xFFFF or len(payload) + len(header) + _PREFIX.size > MAX_MESSAGE_BYTES:
        raise LocalProtocolError(f"a block of {len(payload):,} bytes is over the limit of {MAX_MESSAGE_BYTES:,}")
    return b"".join((_PREFIX.pack(_FRAME, len(header)), header, payload))


def _decode_frame(view: memoryview) -> Frame:
    if len(view) < _PREFIX.size or len(view) > MAX_MESSAGE_BYTES:
        raise RemoteProtocolError(f"no frame is {len(view):,} bytes long")
    start = _PREFIX.size + _PREFIX.unpack_from(view)[1]
    if start > len(view):
        raise RemoteProtocolError("a frame that ends within its header")
    payload = view[start:]
    packed = unsummed("frame's header", view[_PREFIX.size : start])
    try:
        header = msgpack.unpackb(packed)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise RemoteProtocolError(f"a frame with a malformed header: {error!r}") from error
    if not isinstance(header, list) or len(header) < _HEADER_ITEMS:
        raise RemoteProtocolError("a frame with a short header")
    version = _count("wire version", header[0])
    check_version(version)
    if len(header) > _HEADER_ITEMS and version <= WIRE_VERSION:
        raise RemoteProtocolError(f"a frame's header with items that version {version} does not have")
    fence = Fence(
        RequestId(_text("request", header[1])),
        Generation(_count("generation", header[2])),
        Epoch(_text("prefill epoch", header[3])),
        Epoch(_text("decode epoch", header[4])),
    )
    if not fence.request or not fence.generation:
        raise RemoteProtocolError("a frame without a fence")
    index = _count("index", header[5])
    checksum = _count("checksum", header[6])
    offset, num_bytes = header[7], header[8]
    if (offset is None) == (num_bytes is None):
        raise RemoteProtocolError("a frame with two places for its payload, or none")
    if len(payload) != (0 if num_bytes is None else _count("payload length", num_bytes)):
        raise RemoteProtocolError(f"a frame with {len(payload)} bytes of payload where {num_bytes} are announced")
    return Frame(fence, index, checksum, payload if offset is None else Located(_count("offset", offset)))


def _count(name: str, value: object) -> int:
    if type(value) is int and value >= 0:  # a bool is no count
        return value
    raise RemoteProtocolError(f"a frame's {name} is {value!r:.40}")


def _text(name: str, value: object) -> str:
    if isinstance(value, str):
        return value
    raise RemoteProtocolError(f"a frame's {name} is {value!r:.40}")


def _fill_body(envelope: pb.HandoffEnvelope, message: HandoffMessage) -> None:
    match message:
        case Offer():
            _fill_offer(envelope.offer, message)
        case Grant(_, num_present, transport):
            envelope.grant.SetInParent()
            envelope.grant.num_present = num_present
            envelope.grant.transport = transport
        case Refuse(_, reason, text, retry_after_s):
            envelope.refuse.reason = _REFUSES.encode(reason)  # type: ignore[assignment]
            envelope.refuse.message = text
            if retry_after_s is not None:
                envelope.refuse.retry_after_s = retry_after_s
        case Ack(_, upto):
            envelope.ack.SetInParent()
            envelope.ack.upto = upto
        case Nack(_, index):
            envelope.nack.SetInParent()
            envelope.nack.index = index
        case Seal(_, num_blocks, num_tokens_last, choices):
            envelope.seal.num_blocks = num_blocks
            envelope.seal.num_tokens_last = num_tokens_last
            for choice in choices:
                envelope.seal.choices.add(first_token=choice.first_token, state=choice.state)
        case Withdraw(_, reason_text):
            envelope.withdraw.SetInParent()
            envelope.withdraw.reason = reason_text
        case Adopted():
            envelope.adopted.SetInParent()
        case Stale(_, highest):
            envelope.stale.SetInParent()
            envelope.stale.highest = highest


def _fill_offer(message: pb.Offer, offer: Offer) -> None:
    if any(len(block_hash) != HASH_BYTES for block_hash in offer.hashes):
        raise ValueError(f"a block hash is {HASH_BYTES} bytes long")
    message.layout = offer.layout
    message.layout_text = offer.layout_text
    message.numerics = offer.numerics
    message.num_tokens = offer.num_tokens
    message.num_choices = offer.num_choices
    message.hashes = b"".join(offer.hashes)
    for transport in offer.transports:
        message.transports.add(name=transport.name, detail=transport.detail)
    message.lease_s = offer.lease_s


def _read_body(envelope: pb.HandoffEnvelope, fence: Fence) -> HandoffMessage:
    match envelope.WhichOneof("body"):
        case "offer":
            return _read_offer(envelope.offer, fence)
        case "grant":
            given(envelope.grant, "transport")
            return Grant(fence, envelope.grant.num_present, envelope.grant.transport)
        case "refuse":
            return _read_refuse(envelope.refuse, fence)
        case "ack":
            return Ack(fence, envelope.ack.upto)
        case "nack":
            return Nack(fence, envelope.nack.index)
        case "seal":
            return _read_seal(envelope.seal, fence)
        case "withdraw":
            return Withdraw(fence, envelope.withdraw.reason)
        case "adopted":
            return Adopted(fence)
        case "stale":
            return Stale(fence, Generation(envelope.stale.highest))
        case _:
            raise RemoteProtocolError("a hand-off message without a body we know")


def _read_offer(message: pb.Offer, fence: Fence) -> Offer:
    given(message, "layout", "num_tokens", "num_choices", "hashes", "transports")
    if len(message.hashes) % HASH_BYTES:
        raise RemoteProtocolError(f"{len(message.hashes)} bytes are no whole number of block hashes")
    if not all(transport.name for transport in message.transports):
        raise RemoteProtocolError("a transport without a name")
    return Offer(
        fence,
        message.layout,
        message.layout_text,
        message.numerics,
        message.num_tokens,
        message.num_choices,
        tuple(
            BlockHash(message.hashes[start : start + HASH_BYTES]) for start in range(0, len(message.hashes), HASH_BYTES)
        ),
        tuple(TransportOffer(transport.name, transport.detail) for transport in message.transports),
        seconds("lease_s", message.lease_s),
    )


def _read_refuse(message: pb.Refuse, fence: Fence) -> Refuse:
    retry_after_s = seconds("retry_after_s", message.retry_after_s) if message.HasField("retry_after_s") else None
    return Refuse(fence, _REFUSES.decode(message.reason), message.message, retry_after_s)


def _read_seal(message: pb.Seal, fence: Fence) -> Seal:
    given(message, "num_blocks", "num_tokens_last", "choices")
    choices = tuple(SealedChoice(choice.first_token, choice.state) for choice in message.choices)
    return Seal(fence, message.num_blocks, message.num_tokens_last, choices)
