"""The messages between a router and a worker, to and from bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable

from proto.control import (
    Abort,
    Attach,
    Failed,
    FromRouter,
    FromWorker,
    Hello,
    Load,
    LoadReport,
    Peer,
    Prefill,
    Progress,
    Redirect,
    Rejected,
    RejectReason,
    Renew,
    Role,
    Tokens,
    Welcome,
)
from proto.errors import RemoteProtocolError
from proto.gen import tandem_pb2 as pb
from proto.ids import Epoch, Generation, RequestId, WorkerId
from proto.layout import WIRE_VERSION
from proto.lifecycle import Stage
from proto.wire.envelope import EnumCodec, given, has, our_fault, seal, seconds, unseal
from proto.wire.request import fill_request, read_request
from proto.wire.tokens import fill_tokens, read_tokens

_ROLES = EnumCodec(Role, pb.Role, "ROLE")
_STAGES = EnumCodec(Stage, pb.Stage, "STAGE")
_REJECTS = EnumCodec(RejectReason, pb.RejectReason, "REJECT_REASON")


def encode_from_router(message: FromRouter) -> bytes:
    envelope = pb.FromRouter(wire_version=WIRE_VERSION)
    with our_fault(type(message).__name__):
        _fill_from_router(envelope, message)
    return seal(envelope)


def _fill_from_router(envelope: pb.FromRouter, message: FromRouter) -> None:
    match message:
        case Hello(router_epoch, worker_epoch, wire_version):
            envelope.hello.router_epoch = router_epoch
            envelope.hello.worker_epoch = worker_epoch
            envelope.hello.wire_version = wire_version
        case Prefill(request, generation, decode, lease_s):
            fill_request(envelope.prefill.request, request)
            envelope.prefill.generation = generation
            _fill_peer(envelope.prefill.decode, decode)
            envelope.prefill.lease_s = lease_s
        case Redirect(request_id, generation, decode):
            envelope.redirect.request = request_id
            envelope.redirect.generation = generation
            _fill_peer(envelope.redirect.decode, decode)
        case Attach(request, generation, local, lease_s, positions):
            fill_request(envelope.attach.request, request)
            envelope.attach.generation = generation
            envelope.attach.local = local
            envelope.attach.lease_s = lease_s
            envelope.attach.positions.extend(positions)
        case Abort(request_id, generation, choices):
            envelope.abort.request = request_id
            envelope.abort.generation = generation
            envelope.abort.choices.extend(choices)
        case Renew(requests, lease_s):
            envelope.renew.requests.extend(requests)
            envelope.renew.lease_s = lease_s


def decode_from_router(data: bytes) -> FromRouter:
    envelope = unseal(pb.FromRouter(), data)
    match envelope.WhichOneof("body"):
        case "hello":
            return _read_hello(envelope.hello)
        case "prefill":
            return _read_prefill(envelope.prefill)
        case "redirect":
            return _read_redirect(envelope.redirect)
        case "attach":
            return _read_attach(envelope.attach)
        case "abort":
            return _read_abort(envelope.abort)
        case "renew":
            return Renew(_request_ids(envelope.renew.requests), seconds("lease_s", envelope.renew.lease_s))
        case _:
            raise RemoteProtocolError("a message from a router without a body we know")


def _read_hello(hello: pb.Hello) -> Hello:
    given(hello, "router_epoch", "wire_version")
    return Hello(Epoch(hello.router_epoch), Epoch(hello.worker_epoch), hello.wire_version)


def _read_prefill(prefill: pb.Prefill) -> Prefill:
    has(prefill, "request", "decode")
    given(prefill, "generation")
    return Prefill(
        read_request(prefill.request),
        Generation(prefill.generation),
        _read_peer(prefill.decode),
        seconds("lease_s", prefill.lease_s),
    )


def _read_redirect(redirect: pb.Redirect) -> Redirect:
    has(redirect, "decode")
    given(redirect, "request", "generation")
    return Redirect(RequestId(redirect.request), Generation(redirect.generation), _read_peer(redirect.decode))


def _read_abort(abort: pb.Abort) -> Abort:
    given(abort, "request", "generation")
    return Abort(RequestId(abort.request), Generation(abort.generation), tuple(abort.choices))


def _read_attach(attach: pb.Attach) -> Attach:
    has(attach, "request")
    given(attach, "generation")
    request = read_request(attach.request)
    if attach.positions and len(attach.positions) != request.params.n:
        raise RemoteProtocolError(f"{len(attach.positions)} positions for {request.params.n} choices")
    return Attach(
        request,
        Generation(attach.generation),
        attach.local,
        seconds("lease_s", attach.lease_s),
        tuple(attach.positions),
    )


def _fill_peer(message: pb.Peer, peer: Peer) -> None:
    message.worker = peer.worker
    message.epoch = peer.epoch
    message.address = peer.address


def _read_peer(message: pb.Peer) -> Peer:
    given(message, "worker", "epoch", "address")
    return Peer(WorkerId(message.worker), Epoch(message.epoch), message.address)


def _request_ids(values: Iterable[str]) -> tuple[RequestId, ...]:
    requests = tuple(RequestId(value) for value in values)
    if not all(requests):
        raise RemoteProtocolError("an empty request id")
    return requests


def encode_from_worker(message: FromWorker) -> bytes:
    envelope = pb.FromWorker(wire_version=WIRE_VERSION)
    with our_fault(type(message).__name__):
        _fill_from_worker(envelope, message)
    return seal(envelope)


def _fill_from_worker(envelope: pb.FromWorker, message: FromWorker) -> None:
    match message:
        case Tokens():
            envelope.tokens.SetInParent()
            fill_tokens(envelope.tokens, message)
        case Welcome(worker, epoch, role, wire_version):
            envelope.welcome.worker = worker
            envelope.welcome.epoch = epoch
            envelope.welcome.role = _ROLES.encode(role)  # type: ignore[assignment]
            envelope.welcome.wire_version = wire_version
        case Progress(request, generation, stage, num_cached, num_bytes, duration_s):
            envelope.progress.request = request
            envelope.progress.generation = generation
            envelope.progress.stage = _STAGES.encode(stage)  # type: ignore[assignment]
            envelope.progress.num_cached = num_cached
            envelope.progress.num_bytes = num_bytes
            envelope.progress.duration_s = duration_s
        case Rejected(request, generation, reason, text, retry_after_s, held):
            envelope.rejected.request = request
            envelope.rejected.generation = generation
            envelope.rejected.reason = _REJECTS.encode(reason)  # type: ignore[assignment]
            envelope.rejected.message = text
            envelope.rejected.held = held
            if retry_after_s is not None:
                envelope.rejected.retry_after_s = retry_after_s
        case Failed(request, generation, status, kind, text, param):
            envelope.failed.request = request
            envelope.failed.generation = generation
            envelope.failed.status = status
            envelope.failed.kind = kind
            envelope.failed.message = text
            if param is not None:
                envelope.failed.param = param
        case LoadReport(load):
            _fill_load(envelope.load_report, load)


def decode_from_worker(data: bytes) -> FromWorker:
    envelope = unseal(pb.FromWorker(), data)
    match envelope.WhichOneof("body"):
        case "tokens":
            return read_tokens(envelope.tokens)
        case "welcome":
            return _read_welcome(envelope.welcome)
        case "progress":
            return _read_progress(envelope.progress)
        case "rejected":
            return _read_rejected(envelope.rejected)
        case "failed":
            return _read_failed(envelope.failed)
        case "load_report":
            return LoadReport(_read_load(envelope.load_report))
        case _:
            raise RemoteProtocolError("a message from a worker without a body we know")


def _read_welcome(welcome: pb.Welcome) -> Welcome:
    given(welcome, "worker", "epoch", "wire_version")
    return Welcome(WorkerId(welcome.worker), Epoch(welcome.epoch), _ROLES.decode(welcome.role), welcome.wire_version)


def _read_progress(progress: pb.Progress) -> Progress:
    given(progress, "request", "generation")
    return Progress(
        RequestId(progress.request),
        Generation(progress.generation),
        _STAGES.decode(progress.stage),
        progress.num_cached,
        progress.num_bytes,
        seconds("duration_s", progress.duration_s),
    )


def _read_rejected(rejected: pb.Rejected) -> Rejected:
    given(rejected, "request", "generation")
    return Rejected(
        RequestId(rejected.request),
        Generation(rejected.generation),
        _REJECTS.decode(rejected.reason),
        rejected.message,
        seconds("retry_after_s", rejected.retry_after_s) if rejected.HasField("retry_after_s") else None,
        rejected.held,
    )


def _read_failed(failed: pb.Failed) -> Failed:
    given(failed, "request", "generation", "kind")
    if not 400 <= failed.status <= 599:
        raise RemoteProtocolError(f"a failure with HTTP status {failed.status}")
    return Failed(
        RequestId(failed.request),
        Generation(failed.generation),
        failed.status,
        failed.kind,
        failed.message,
        failed.param if failed.HasField("param") else None,
    )


def _fill_load(message: pb.Load, load: Load) -> None:
    message.SetInParent()
    message.num_running = load.num_running
    message.num_waiting = load.num_waiting
    message.num_waiting_tokens = load.num_waiting_tokens
    message.num_free_blocks = load.num_free_blocks
    message.num_blocks = load.num_blocks
    message.tokens_per_s = load.tokens_per_s
    message.num_soon_free_blocks = load.num_soon_free_blocks


def _read_load(message: pb.Load) -> Load:
    if not (math.isfinite(message.tokens_per_s) and message.tokens_per_s >= 0.0):
        raise RemoteProtocolError(f"tokens_per_s is no rate: {message.tokens_per_s}")
    return Load(
        message.num_running,
        message.num_waiting,
        message.num_waiting_tokens,
        message.num_free_blocks,
        message.num_blocks,
        message.tokens_per_s,
        message.num_soon_free_blocks,
    )
