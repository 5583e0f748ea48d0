"""What all envelopes share: a checksum, size limits, versions, and how faults of either side become errors of the tree.

    checksum (CRC-32, u32) | envelope (protobuf)

TCP's own checksum misses a damaged packet now and then, and gRPC has none: a flipped bit in a token or in a fence would
be believed. Knows no particular message.
"""

from __future__ import annotations

import enum
import math
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Generic, TypeVar

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message import DecodeError, EncodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from proto.errors import LocalProtocolError, RemoteProtocolError
from proto.layout import WIRE_VERSION

MAX_MESSAGE_BYTES = 256 << 20
"""Largest message of any kind: a model card with its tokenizer, or a frame with one block."""
MAX_CONTROL_BYTES = 32 << 20
"""Largest message that is neither: a prompt of a few million tokens."""
_SUM = struct.Struct(">I")

E = TypeVar("E", bound=Message)


def check_version(version: int) -> None:
    """Accepts our version and its neighbours: fields are only added, so both sides of a rolling update can read."""
    if version < 1 or abs(version - WIRE_VERSION) > 1:
        raise RemoteProtocolError(f"wire version {version} does not go with ours, {WIRE_VERSION}")


def summed(data: bytes) -> bytes:
    """``data`` behind its checksum."""
    return _SUM.pack(zlib.crc32(data)) + data


def unsummed(name: str, data: memoryview) -> memoryview:
    """What is behind the checksum of a ``name``. Raises RemoteProtocolError where that does not go with it."""
    body = data[_SUM.size :]
    if len(data) < _SUM.size or _SUM.unpack_from(data)[0] != zlib.crc32(body):
        raise RemoteProtocolError(f"a damaged {name}")
    return body


def seal(message: Message, limit: int = MAX_CONTROL_BYTES) -> bytes:
    """The bytes of a filled envelope. Raises LocalProtocolError when they are too many."""
    with our_fault(message.DESCRIPTOR.name):
        data = summed(message.SerializeToString())
    if len(data) > limit:
        raise LocalProtocolError(f"a {message.DESCRIPTOR.name} of {len(data):,} bytes is over the limit of {limit:,}")
    return data


def unseal(envelope: E, data: bytes | memoryview, limit: int = MAX_CONTROL_BYTES) -> E:
    """Parses ``data`` into the empty ``envelope``. Raises RemoteProtocolError.

    Fields that we do not know are a newer sender's additions; from a sender of our version they are garbage.
    """
    name = envelope.DESCRIPTOR.name
    if len(data) > limit:
        raise RemoteProtocolError(f"a {name} of {len(data):,} bytes is over the limit of {limit:,}")
    body = unsummed(name, memoryview(data))
    try:
        envelope.ParseFromString(bytes(body))
    except DecodeError as error:
        raise RemoteProtocolError(f"not a {name}: {error}") from error
    version: int = envelope.wire_version  # type: ignore[attr-defined]  # every envelope has it
    check_version(version)
    if version <= WIRE_VERSION and len(UnknownFieldSet(envelope)):
        raise RemoteProtocolError(f"a {name} with fields that version {version} does not have")
    return envelope


@contextmanager
def our_fault(name: str) -> Iterator[None]:
    """What protobuf cannot hold (a number out of range, half a surrogate pair) is a fault of who made the object."""
    try:
        yield
    except (ValueError, TypeError, EncodeError) as error:
        raise LocalProtocolError(f"this {name} cannot be sent: {error}") from error


M = TypeVar("M", bound=enum.Enum)


class EnumCodec(Generic[M]):
    """One of our enums and its generated twin, whose values are ``<PREFIX>_<member>``."""

    def __init__(self, members: type[M], wire: EnumTypeWrapper, prefix: str) -> None:
        self._name = members.__name__
        self._to_wire = {member: wire.Value(f"{prefix}_{member.name}") for member in members}
        self._from_wire = {number: member for member, number in self._to_wire.items()}

    def encode(self, member: M) -> int:
        return self._to_wire[member]

    def decode(self, number: int) -> M:
        if member := self._from_wire.get(number):
            return member
        raise RemoteProtocolError(f"unknown {self._name}: {number}")


def given(message: Message, *names: str) -> None:
    """Raises RemoteProtocolError unless every named field is set and not empty or zero."""
    for name in names:
        if not getattr(message, name):
            raise RemoteProtocolError(f"{message.DESCRIPTOR.name} without {name}")


def has(message: Message, *names: str) -> None:
    """Raises RemoteProtocolError unless every named message field is present."""
    for name in names:
        if not message.HasField(name):
            raise RemoteProtocolError(f"{message.DESCRIPTOR.name} without {name}")


def seconds(name: str, value: float) -> float:
    """A duration: finite and not negative, or RemoteProtocolError."""
    if math.isfinite(value) and value >= 0.0:
        return value
    raise RemoteProtocolError(f"{name} is no duration: {value}")


def column(name: str, values: Iterable[int], bound: int) -> tuple[int, ...]:
    """Ascending, distinct indices below ``bound``, or RemoteProtocolError."""
    indices = tuple(values)
    if any(later <= earlier for earlier, later in pairwise(indices)):
        raise RemoteProtocolError(f"{name} is not ascending")
    if indices and indices[-1] >= bound:
        raise RemoteProtocolError(f"{name} points past the {bound} tokens there are")
    return indices


def same_length(message: Message, *names: str) -> None:
    """Raises RemoteProtocolError unless the named repeated fields are equally long."""
    if len({len(getattr(message, name)) for name in names}) > 1:
        raise RemoteProtocolError(f"{message.DESCRIPTOR.name}'s {', '.join(names)} differ in length")
