"""Version N and N-1 side by side, as in a rolling update: who is newer is understood, and understands.

There is one version of the wire so far, so the newer one is made here: the same messages with fields that nobody has
heard of, under the next number.
"""

from __future__ import annotations

from collections.abc import Callable

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proto import layout, wire
from proto.control import Load, LoadReport
from proto.errors import RemoteProtocolError
from proto.gen import tandem_pb2 as pb
from proto.handoff import Frame, HandoffMessage, Located
from proto.layout import WIRE_VERSION, KvLayout
from proto.wire import envelope
from proto.wire import handoff as handoff_wire
from proto.wire.envelope import summed
from tests.support.messages import (
    CARDS,
    FROM_ROUTER,
    FROM_WORKER,
    HANDOFF,
    REPORTS,
    bare,
    bare_handoff,
    summed_handoff,
)

NEWS = b"\xfa\x7f\x03abc"
"""A well-formed field of a number that nobody has yet."""
Codec = tuple[st.SearchStrategy[object], Callable[[object], bytes], Callable[[bytes], object], type]
CODECS: list[Codec] = [
    (FROM_ROUTER, wire.encode_from_router, wire.decode_from_router, pb.FromRouter),  # type: ignore[list-item]
    (FROM_WORKER, wire.encode_from_worker, wire.decode_from_worker, pb.FromWorker),  # type: ignore[list-item]
    (CARDS, wire.encode_card, wire.decode_card, pb.ModelCard),  # type: ignore[list-item]
    (REPORTS, wire.encode_health, wire.decode_health, pb.HealthReport),  # type: ignore[list-item]
]
quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
each_codec = pytest.mark.parametrize(("messages", "encode", "decode", "kind"), CODECS, ids=lambda each: str(each)[:30])


def from_newer(data: bytes, kind: type) -> bytes:
    """What a sender of the next version would send."""
    message = kind.FromString(bare(data))  # type: ignore[attr-defined]
    message.wire_version = WIRE_VERSION + 1
    return summed(bytes(message.SerializeToString()) + NEWS)


def frame_of(version: int, data: bytes, *added: object) -> bytes:
    plain = bare_handoff(data)
    start = 3 + int.from_bytes(plain[1:3], "big")
    header = msgpack.packb([version, *msgpack.unpackb(plain[3:start])[1:], *added])
    return summed_handoff(b"\x01" + len(header).to_bytes(2, "big") + header + plain[start:])


def handoff_from_newer(message: HandoffMessage) -> bytes:
    data = wire.encode_handoff(message)
    if isinstance(message, Frame):
        return frame_of(WIRE_VERSION + 1, data, "news", 7)
    return b"\x00" + from_newer(data[1:], pb.HandoffEnvelope)


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> int:
    """This process is of the next version; returns it."""
    for module in (layout, envelope, handoff_wire):
        monkeypatch.setattr(module, "WIRE_VERSION", WIRE_VERSION + 1)
    return WIRE_VERSION + 1


def same(one: HandoffMessage, other: HandoffMessage) -> bool:
    if isinstance(one, Frame) and isinstance(other, Frame) and not isinstance(one.payload, Located):
        return (one.fence, one.index, one.checksum) == (other.fence, other.index, other.checksum) and bytes(
            one.payload
        ) == bytes(other.payload)  # type: ignore[arg-type]
    return one == other


@each_codec
@quick
@given(draw=st.data())
def test_we_understand_a_newer_sender_and_ignore_its_news(
    messages: st.SearchStrategy[object],
    encode: Callable[[object], bytes],
    decode: Callable[[bytes], object],
    kind: type,
    draw: st.DataObject,
) -> None:
    message = draw.draw(messages)
    assert decode(from_newer(encode(message), kind)) == message


@quick
@given(HANDOFF)
def test_a_hand_off_from_a_newer_sender(message: HandoffMessage) -> None:
    assert same(wire.decode_handoff(handoff_from_newer(message)), message)


@each_codec
@quick
@given(draw=st.data())
def test_a_newer_reader_understands_us(
    newer: int,
    messages: st.SearchStrategy[object],
    encode: Callable[[object], bytes],
    decode: Callable[[bytes], object],
    kind: type,
    draw: st.DataObject,
) -> None:
    """Nothing that only the newer version has is demanded of the older one."""
    message = draw.draw(messages)
    ours = kind.FromString(bare(encode(message)))  # type: ignore[attr-defined]
    ours.wire_version = newer - 1
    assert decode(summed(ours.SerializeToString())) == message


@quick
@given(HANDOFF)
def test_a_hand_off_to_a_newer_reader(newer: int, message: HandoffMessage) -> None:
    data = wire.encode_handoff(message)
    if isinstance(message, Frame):
        ours = frame_of(newer - 1, data)
    else:
        envelope_sent = pb.HandoffEnvelope.FromString(bare(data[1:]))
        envelope_sent.wire_version = newer - 1
        ours = b"\x00" + summed(envelope_sent.SerializeToString())
    assert same(wire.decode_handoff(ours), message)


@each_codec
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(draw=st.data())
def test_two_versions_apart_is_refused(
    messages: st.SearchStrategy[object],
    encode: Callable[[object], bytes],
    decode: Callable[[bytes], object],
    kind: type,
    draw: st.DataObject,
) -> None:
    message = kind.FromString(bare(encode(draw.draw(messages))))  # type: ignore[attr-defined]
    message.wire_version = WIRE_VERSION + 2
    with pytest.raises(RemoteProtocolError, match="does not go with ours"):
        decode(summed(message.SerializeToString()))


OLD_LOAD = {"num_running": 3, "num_waiting": 2, "num_waiting_tokens": 70, "num_free_blocks": 5, "num_blocks": 9}


def test_a_load_without_soon_free_blocks_is_an_older_worker_s() -> None:
    report = pb.FromWorker(wire_version=WIRE_VERSION, load_report=pb.Load(**OLD_LOAD, tokens_per_s=1.5))
    data = summed(report.SerializeToString())
    assert wire.decode_from_worker(data) == LoadReport(Load(**OLD_LOAD, tokens_per_s=1.5, num_soon_free_blocks=0))


def test_an_older_router_reads_a_load_that_says_more() -> None:
    """As one that has no number 7 in its schema reads ours, this one reads a number that nobody has."""
    load = Load(**OLD_LOAD, tokens_per_s=1.5, num_soon_free_blocks=4)
    report = pb.FromWorker.FromString(bare(wire.encode_from_worker(LoadReport(load))))
    report.load_report.MergeFromString(NEWS)
    assert wire.decode_from_worker(summed(report.SerializeToString())) == LoadReport(load)


def test_a_newer_wire_does_not_make_blocks_foreign(newer: int) -> None:
    """Or no block would change hands while an update rolls."""
    shape = KvLayout(2, 16, 4, 32, "float32", "digest")
    assert shape.fingerprint() == "b7c6c6c3eecb3ee0d54ae2b6"
