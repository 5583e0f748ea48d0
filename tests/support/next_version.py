"""``python -m tandem``, as the next release might be: it speaks the next version of the wire, has news in every message
and record, and knows what they mean.

    python -m tests.support.next_version prefill|decode|router
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import msgpack

import proto.layout
import proto.version

NEWS = b"\xfa\x7f\x03abc"
"""A well-formed field of a number that nobody has yet."""


def become_next() -> None:
    """Before anything but these two modules is imported: the others copy what they say."""
    proto.layout.WIRE_VERSION += 1
    proto.version.__version__ += ".next"
    from kvtransfer.ledger import records
    from proto.wire import card, control, envelope, handoff

    for codec in (card, control, handoff):
        codec.seal = _telling(codec.seal)
    envelope.UnknownFieldSet = lambda message: ()
    handoff.summed, handoff.unsummed = _frames(handoff.summed, handoff.unsummed, handoff._HEADER_ITEMS)
    packed = records._packed
    records._packed = lambda fields: packed({**fields, "news": "abc"})


def _telling(seal: Callable[..., bytes]) -> Callable[..., bytes]:
    def tell(message: object, *limit: int) -> bytes:
        message.MergeFromString(NEWS)  # type: ignore[attr-defined]
        return seal(message, *limit)

    return tell


def _frames(
    summed: Callable[[bytes], bytes], unsummed: Callable[[str, memoryview], memoryview], num_known: int
) -> tuple[Callable[[bytes], bytes], Callable[[str, memoryview], bytes]]:
    """Frames' headers with one item more, written and read."""

    def write(header: bytes) -> bytes:
        return summed(msgpack.packb([*msgpack.unpackb(header), "news"]))

    def read(name: str, data: memoryview) -> bytes:
        return bytes(msgpack.packb(msgpack.unpackb(unsummed(name, data))[:num_known]))

    return write, read


if __name__ == "__main__":
    become_next()
    from tandem.cli import main

    sys.exit(main())
