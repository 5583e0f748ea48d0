"""Typed objects to and from the bytes that travel. The only code that knows the generated classes.

    encode_*    raises LocalProtocolError when an object cannot travel: our own bug
    decode_*    raises RemoteProtocolError, and nothing else, whatever the bytes are

Decoded objects satisfy their classes' own rules, so a worker may rely on them. What they mean for a particular hand-off
or request (fences, order, layout) is judged elsewhere.
"""

from proto.wire.card import decode_card, decode_health, encode_card, encode_health
from proto.wire.control import decode_from_router, decode_from_worker, encode_from_router, encode_from_worker
from proto.wire.envelope import MAX_CONTROL_BYTES, MAX_MESSAGE_BYTES
from proto.wire.handoff import decode_handoff, encode_handoff

__all__ = [
    "MAX_CONTROL_BYTES",
    "MAX_MESSAGE_BYTES",
    "decode_card",
    "decode_from_router",
    "decode_from_worker",
    "decode_handoff",
    "decode_health",
    "encode_card",
    "encode_from_router",
    "encode_from_worker",
    "encode_handoff",
    "encode_health",
]
