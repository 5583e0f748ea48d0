"""Every typed object survives the wire, and no bytes whatever bring anything but RemoteProtocolError."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proto import wire
from proto.control import (
    Abort,
    FromRouter,
    FromWorker,
    ModelCard,
    Peer,
    Prefill,
    RejectReason,
    Role,
    Tokens,
)
from proto.errors import LocalProtocolError, RemoteProtocolError
from proto.gen import tandem_pb2 as pb
from proto.handoff import (
    Fence,
    Frame,
    HandoffMessage,
    Located,
    Offer,
    RefuseReason,
    TransportOffer,
    Withdraw,
)
from proto.health import HealthReport, Phase
from proto.ids import BlockHash, Epoch, Generation, RequestId, WorkerId
from proto.layout import WIRE_VERSION
from proto.lifecycle import Stage
from proto.request import FinishReason, Request, SamplingParams, TokenOut
from proto.wire.envelope import EnumCodec, seal, summed, unseal
from tests.support.messages import (
    CARDS,
    FROM_ROUTER,
    FROM_WORKER,
    HANDOFF,
    REPORTS,
    TEXT,
    bare,
    bare_handoff,
    summed_handoff,
)

Decoder = Callable[[bytes], object]
ENCODED: list[tuple[Decoder, st.SearchStrategy[bytes]]] = [
    (wire.decode_from_router, FROM_ROUTER.map(wire.encode_from_router)),
    (wire.decode_from_worker, FROM_WORKER.map(wire.encode_from_worker)),
    (wire.decode_handoff, HANDOFF.map(wire.encode_handoff)),
    (wire.decode_card, CARDS.map(wire.encode_card)),
    (wire.decode_health, REPORTS.map(wire.encode_health)),
]
DECODERS = [decoder for decoder, _ in ENCODED]
FENCE = Fence(RequestId("r.1"), Generation(2), Epoch("p"), Epoch("d"))
quick = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


# ---- there and back --------------------------------------------------------------------------------------------------


@quick
@given(FROM_ROUTER)
def test_what_a_router_says_arrives_as_it_was(message: FromRouter) -> None:
    assert wire.decode_from_router(wire.encode_from_router(message)) == message


@quick
@given(FROM_WORKER)
def test_what_a_worker_says_arrives_as_it_was(message: FromWorker) -> None:
    assert wire.decode_from_worker(wire.encode_from_worker(message)) == message


@quick
@given(HANDOFF)
def test_a_hand_off_message_arrives_as_it_was(message: HandoffMessage) -> None:
    assert wire.decode_handoff(wire.encode_handoff(message)) == message


@quick
@given(CARDS)
def test_a_card_arrives_as_it_was(card: ModelCard) -> None:
    assert wire.decode_card(wire.encode_card(card)) == card


@quick
@given(REPORTS)
def test_a_report_arrives_as_it_was(report: HealthReport) -> None:
    assert wire.decode_health(wire.encode_health(report)) == report


def request_with(**params: object) -> Request:
    return Request(
        id=RequestId("r.1"),
        prompt=(1, 2),
        params=SamplingParams(**({"seed": 7} | params)),  # type: ignore[arg-type]
    )


def sent(request: Request) -> Request:
    message = Prefill(request, Generation(1), Peer(WorkerId("d"), Epoch("e"), "h:1"), 1.0)
    arrived = wire.decode_from_router(wire.encode_from_router(message))
    assert isinstance(arrived, Prefill)
    return arrived.request


@pytest.mark.parametrize("name", ["stop", "stop_token_ids", "logit_bias"])
@pytest.mark.parametrize("value", [None, ()])
def test_none_and_empty_stay_apart(name: str, value: tuple[()] | None) -> None:
    assert getattr(sent(request_with(**{name: value})).params, name) == value


def test_unchecked_shapes_arrive_in_their_normal_form() -> None:
    params = sent(request_with(stop="end", logit_bias={5: 1.5, 2: -1.0}, seed=-1, stop_token_ids=[4])).params
    assert params.stop == ("end",)
    assert params.logit_bias == ((2, -1.0), (5, 1.5))
    assert params.stop_token_ids == (4,)
    assert params.seed == (1 << 64) - 1


def test_a_payload_is_not_copied_on_arrival() -> None:
    data = wire.encode_handoff(Frame(FENCE, 0, 1, memoryview(b"0123456789")[2:6]))
    frame = wire.decode_handoff(data)
    assert isinstance(frame, Frame)
    assert isinstance(frame.payload, memoryview)
    assert bytes(frame.payload) == b"2345"
    assert frame.payload.obj is data


def test_a_payload_of_wider_items_travels_as_bytes() -> None:
    from array import array

    frame = wire.decode_handoff(wire.encode_handoff(Frame(FENCE, 0, 1, memoryview(array("d", [1.0, 2.0])))))
    assert isinstance(frame, Frame)
    assert bytes(frame.payload) == array("d", [1.0, 2.0]).tobytes()  # type: ignore[arg-type]


def test_tokens_stay_small() -> None:
    requests = [RequestId(f"0123456789abcdef.{number}") for number in range(256)]
    tokens = Tokens(
        tuple((request, Generation(1)) for request in requests),
        tuple(TokenOut(request, 0, 500, 100_000) for request in requests),
    )
    assert len(wire.encode_from_worker(tokens)) < 256 * 34  # of which the request's own id is 20 and its tag 2


# ---- bytes of any origin ---------------------------------------------------------------------------------------------


def resummed(decode: Decoder, data: bytes) -> bytes:
    """With the checksum that goes with the rest."""
    return summed_handoff(bare_handoff(data)) if decode is wire.decode_handoff else summed(bare(data))


def decodes_or_refuses(decode: Decoder, data: bytes) -> None:
    with suppress(RemoteProtocolError):
        decode(data)


@pytest.mark.parametrize("decode", DECODERS)
@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300))
def test_arbitrary_bytes(decode: Decoder, data: bytes) -> None:
    decodes_or_refuses(decode, data)
    decodes_or_refuses(decode, summed(b"\x08\x01" + data))  # past checksum and version
    decodes_or_refuses(decode, b"\x00" + summed(b"\x08\x01" + data))
    decodes_or_refuses(decode, b"\x01" + data)


@st.composite
def mutated(draw: st.DrawFn, valid: st.SearchStrategy[bytes]) -> bytes:
    data = bytearray(draw(valid))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["flip", "cut", "insert", "repeat"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at : at + draw(st.integers(1, 8))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case _:
                data += data[at:]
    return bytes(data)


@pytest.mark.parametrize(("decode", "valid"), ENCODED)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(draw=st.data())
def test_damaged_messages(decode: Decoder, valid: st.SearchStrategy[bytes], draw: st.DataObject) -> None:
    decodes_or_refuses(decode, draw.draw(mutated(valid)))


@pytest.mark.parametrize(("decode", "valid"), ENCODED)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(draw=st.data())
def test_damage_behind_a_checksum_that_goes_with_it(
    decode: Decoder, valid: st.SearchStrategy[bytes], draw: st.DataObject
) -> None:
    """As a peer that is wrong, not a wire, would send it."""
    decodes_or_refuses(decode, resummed(decode, draw.draw(mutated(valid))))


@pytest.mark.parametrize(("decode", "valid"), ENCODED)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(draw=st.data())
def test_no_flipped_bit_is_believed(decode: Decoder, valid: st.SearchStrategy[bytes], draw: st.DataObject) -> None:
    """But in a block's payload, whose checksum is compared in the memory that it ends up in."""
    data = draw.draw(valid)
    message = decode(data)
    num_payload = 0 if not isinstance(message, Frame) or isinstance(message.payload, Located) else len(message.payload)
    bit = draw.draw(st.integers(0, 8 * (len(data) - num_payload) - 1))
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RemoteProtocolError):
        decode(bytes(flipped))


@pytest.mark.parametrize(("decode", "valid"), ENCODED)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(draw=st.data())
def test_trailing_garbage_is_refused(decode: Decoder, valid: st.SearchStrategy[bytes], draw: st.DataObject) -> None:
    data = draw.draw(valid)
    with pytest.raises(RemoteProtocolError):
        decode(resummed(decode, data + b"\xfa\x7f\x03abc"))  # a well-formed field, of a number that nobody has


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    scalar = st.none() | st.booleans() | st.integers(-5, 1 << 64 - 1) | st.floats() | TEXT | st.binary(max_size=5)
    items = st.sampled_from([WIRE_VERSION, 0, 4, "r.1", None]) | scalar | st.lists(scalar, max_size=3)
    header = summed(msgpack.packb(draw(st.lists(items, max_size=11))))
    return b"\x01" + len(header).to_bytes(2, "big") + header + draw(st.binary(max_size=4))


@settings(max_examples=300, deadline=None)
@given(headers())
def test_frame_headers_of_any_shape(data: bytes) -> None:
    decodes_or_refuses(wire.decode_handoff, data)


# ---- particular faults -----------------------------------------------------------------------------------------------


def refuses(decode: Decoder, envelope: pb.FromRouter | pb.FromWorker | pb.HandoffEnvelope, match: str) -> None:
    data = seal(envelope)
    with pytest.raises(RemoteProtocolError, match=match):
        decode(b"\x00" + data if isinstance(envelope, pb.HandoffEnvelope) else data)


def prefill() -> pb.FromRouter:
    """A valid one, to be spoilt."""
    message = Prefill(request_with(), Generation(1), Peer(WorkerId("d"), Epoch("e"), "h:1"), 1.0)
    return unseal(pb.FromRouter(), wire.encode_from_router(message))


@pytest.mark.parametrize(
    ("field", "match"),
    [
        ("request", "without request"),
        ("generation", "without generation"),
        ("decode", "without decode"),
        ("request.id", "without id"),
        ("request.prompt", "without prompt"),
        ("request.params", "without params"),
        ("request.params.seed", "without a seed"),
        ("request.params.n", "0 choices"),
        ("request.params.top_p", "never checked: top_p"),
        ("request.params.repetition_penalty", "never checked: repetition_penalty"),
        ("decode.address", "without address"),
    ],
)
def test_a_missing_field_is_named(field: str, match: str) -> None:
    envelope = prefill()
    *path, last = field.split(".")
    message = envelope.prefill
    for name in path:
        message = getattr(message, name)
    message.ClearField(last)  # type: ignore[arg-type]
    refuses(wire.decode_from_router, envelope, match)


def test_values_no_router_would_send() -> None:
    envelope = prefill()
    envelope.prefill.lease_s = float("nan")
    refuses(wire.decode_from_router, envelope, "lease_s")
    envelope = prefill()
    envelope.prefill.request.params.temperature = float("inf")
    refuses(wire.decode_from_router, envelope, "temperature")
    envelope = prefill()
    envelope.prefill.request.forced.add()
    envelope.prefill.request.forced.add()
    refuses(wire.decode_from_router, envelope, "2 lists of forced tokens for 1 choices")
    envelope = prefill()
    envelope.prefill.request.params.logit_bias.tokens.append(3)
    refuses(wire.decode_from_router, envelope, "differ in length")


@pytest.mark.parametrize("version", [0, WIRE_VERSION + 2])
def test_a_distant_version_is_refused(version: int) -> None:
    envelope = prefill()
    envelope.wire_version = version
    refuses(wire.decode_from_router, envelope, "wire version")


def test_a_newer_neighbour_may_have_added_fields() -> None:
    envelope = prefill()
    envelope.wire_version = WIRE_VERSION + 1
    data = summed(envelope.SerializeToString() + b"\xfa\x7f\x03abc")
    assert isinstance(wire.decode_from_router(data), Prefill)


def test_a_newer_neighbour_may_have_appended_to_a_frame_s_header() -> None:
    header = summed(msgpack.packb([WIRE_VERSION + 1, "r.1", 1, "p", "d", 0, 9, None, 3, "news"]))
    frame = wire.decode_handoff(b"\x01" + len(header).to_bytes(2, "big") + header + b"abc")
    assert isinstance(frame, Frame)
    assert bytes(frame.payload) == b"abc"  # type: ignore[arg-type]


def test_a_message_without_a_known_body() -> None:
    refuses(wire.decode_from_router, pb.FromRouter(wire_version=1), "without a body")
    refuses(wire.decode_from_worker, pb.FromWorker(wire_version=1), "without a body")
    fence = pb.Fence(request="r.1", generation=1)
    refuses(wire.decode_handoff, pb.HandoffEnvelope(wire_version=1, fence=fence), "without a body")


def test_a_message_without_a_fence() -> None:
    refuses(wire.decode_handoff, pb.HandoffEnvelope(wire_version=1, ack=pb.Ack(upto=1)), "without fence")
    empty = pb.HandoffEnvelope(wire_version=1, fence=pb.Fence(generation=1), ack=pb.Ack(upto=1))
    refuses(wire.decode_handoff, empty, "without request")


@pytest.mark.parametrize("number", [0, 99])
def test_an_unknown_enum_value(number: int) -> None:
    welcome = pb.Welcome(worker="w", epoch="e", role=number, wire_version=1)  # type: ignore[arg-type]
    refuses(wire.decode_from_worker, pb.FromWorker(wire_version=1, welcome=welcome), f"unknown Role: {number}")


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        (pb.Tokens(requests=["r"], request_at=[0], choice=[0], position=[0]), "differ in length"),
        (pb.Tokens(requests=["r"], request_at=[1], choice=[0], position=[0], token=[5]), "not listed"),
        (pb.Tokens(requests=["r", ""]), "ids"),
        (pb.Tokens(generation=[1]), "ids"),
        (pb.Tokens(finish_at=[0], finish=[1]), "points past"),  # type: ignore[list-item]
        (pb.Tokens(stop_at=[1, 1], stop_token=[2, 2]), "not ascending"),
        (pb.Tokens(logprobs_at=[0]), "differ in length"),
    ],
)
def test_columns_that_do_not_fit_together(tokens: pb.Tokens, match: str) -> None:
    refuses(wire.decode_from_worker, pb.FromWorker(wire_version=1, tokens=tokens), match)


def test_hashes_that_are_no_whole_number() -> None:
    offer = Offer(FENCE, "l", "t", "n", 3, 1, (BlockHash(b"x" * 16),), (TransportOffer("grpc"),), 1.0)
    envelope = unseal(pb.HandoffEnvelope(), wire.encode_handoff(offer)[1:])
    envelope.offer.hashes += b"x"
    refuses(wire.decode_handoff, envelope, "17 bytes")


@pytest.mark.parametrize("decode", DECODERS)
def test_a_message_that_is_too_large(decode: Decoder) -> None:
    with pytest.raises(RemoteProtocolError, match=r"over the limit|unknown kind|no frame"):
        decode(bytes(wire.MAX_MESSAGE_BYTES + 2))


# ---- our own faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        Abort(RequestId("\ud800"), Generation(1)),
        Abort(RequestId("r.1"), Generation(-1)),
        Prefill(
            dataclasses.replace(request_with(), prompt=(1 << 32,)),
            Generation(1),
            Peer(WorkerId("d"), Epoch("e"), "h"),
            1.0,
        ),
    ],
)
def test_what_cannot_travel_is_our_own_fault(message: FromRouter) -> None:
    with pytest.raises(LocalProtocolError, match=type(message).__name__):
        wire.encode_from_router(message)


def test_too_much_is_our_own_fault() -> None:
    with pytest.raises(LocalProtocolError, match="over the limit"):
        wire.encode_handoff(Frame(FENCE, 0, 0, bytes(wire.MAX_MESSAGE_BYTES)))
    with pytest.raises(LocalProtocolError, match="over the limit"):
        wire.encode_handoff(Withdraw(FENCE, "x" * (wire.MAX_CONTROL_BYTES + 1)))
    bad_hash = Offer(FENCE, "l", "t", "n", 3, 1, (BlockHash(b"short"),), (TransportOffer("grpc"),), 1.0)
    with pytest.raises(LocalProtocolError, match="16 bytes"):
        wire.encode_handoff(bad_hash)


@pytest.mark.parametrize(
    ("members", "twin", "prefix"),
    [
        (Role, pb.Role, "ROLE"),
        (Stage, pb.Stage, "STAGE"),
        (FinishReason, pb.FinishReason, "FINISH_REASON"),
        (RejectReason, pb.RejectReason, "REJECT_REASON"),
        (RefuseReason, pb.RefuseReason, "REFUSE_REASON"),
        (Phase, pb.Phase, "PHASE"),
    ],
)
def test_every_enum_has_its_twin(members: type, twin: object, prefix: str) -> None:
    codec: EnumCodec = EnumCodec(members, twin, prefix)  # type: ignore[type-arg, type-var, arg-type]
    assert [codec.decode(codec.encode(member)) for member in members] == list(members)  # type: ignore[attr-defined]
    assert len(twin.items()) == len(list(members)) + 1  # type: ignore[attr-defined, arg-type]
