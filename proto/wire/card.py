"""What a worker says of itself, to and from bytes: its model card and its health."""

from __future__ import annotations

import math

from proto.control import ModelCard
from proto.errors import RemoteProtocolError
from proto.gen import tandem_pb2 as pb
from proto.health import HealthReport, Phase
from proto.layout import WIRE_VERSION
from proto.wire.envelope import MAX_MESSAGE_BYTES, EnumCodec, given, our_fault, seal, seconds, unseal

_PHASES = EnumCodec(Phase, pb.Phase, "PHASE")


def encode_card(card: ModelCard) -> bytes:
    envelope = pb.ModelCard(wire_version=WIRE_VERSION)
    with our_fault("ModelCard"):
        envelope.model = card.model
        envelope.served_names.extend(card.served_names)
        envelope.digest = card.digest
        envelope.max_model_len = card.max_model_len
        envelope.vocab_size = card.vocab_size
        envelope.eos_token_ids.extend(card.eos_token_ids)
        envelope.block_size = card.block_size
        envelope.layout = card.layout
        envelope.hash_namespace = card.hash_namespace
        for name, content in card.files.items():
            envelope.files[name] = content
    return seal(envelope, MAX_MESSAGE_BYTES)


def decode_card(data: bytes) -> ModelCard:
    envelope = unseal(pb.ModelCard(), data, MAX_MESSAGE_BYTES)
    given(envelope, "model", "max_model_len", "vocab_size", "block_size")
    return ModelCard(
        model=envelope.model,
        served_names=tuple(envelope.served_names),
        digest=envelope.digest,
        max_model_len=envelope.max_model_len,
        vocab_size=envelope.vocab_size,
        eos_token_ids=tuple(envelope.eos_token_ids),
        block_size=envelope.block_size,
        layout=envelope.layout,
        hash_namespace=envelope.hash_namespace,
        files=dict(envelope.files),
    )


def encode_health(report: HealthReport) -> bytes:
    envelope = pb.HealthReport(wire_version=WIRE_VERSION)
    with our_fault("HealthReport"):
        envelope.phase = _PHASES.encode(report.phase)  # type: ignore[assignment]
        envelope.is_ready = report.is_ready
        envelope.detail = report.detail
        envelope.is_working = report.is_working
        if report.progress is not None:
            envelope.progress = report.progress
        if report.last_step_age_s is not None:
            envelope.last_step_age_s = report.last_step_age_s
    return seal(envelope)


def decode_health(data: bytes) -> HealthReport:
    envelope = unseal(pb.HealthReport(), data)
    if not math.isfinite(envelope.progress):
        raise RemoteProtocolError(f"progress is no number: {envelope.progress}")
    return HealthReport(
        phase=_PHASES.decode(envelope.phase),
        is_ready=envelope.is_ready,
        detail=envelope.detail,
        progress=envelope.progress if envelope.HasField("progress") else None,
        last_step_age_s=(
            seconds("last_step_age_s", envelope.last_step_age_s) if envelope.HasField("last_step_age_s") else None
        ),
        is_working=envelope.is_working,
    )
