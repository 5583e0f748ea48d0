"""What the ledger says, as values, and how each is written down.

Knows the records' fields and their bytes (msgpack for records, flat fields for stream entries, so that redis-cli can
read a stream). Knows nothing of Redis, of keys, or of who reads and writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgpack

from proto.control import Load, Peer, Role
from proto.errors import RemoteProtocolError
from proto.hashing import HASH_BYTES
from proto.ids import BlockHash, Epoch, Generation, RequestId, WorkerId
from proto.inventory import CacheChange, Cleared, Evicted, Stored
from proto.lifecycle import Stage

DEVICE = "device"
"""The tier of blocks in a worker's KV memory."""

_T = TypeVar("_T")

_USUAL_BYTES = 1024
"""A record is packed into a buffer of this size, which grows. By itself msgpack takes a megabyte for each."""


class LedgerAway(Exception):
    """Redis did not answer, or not as Redis should, or takes no writes: out of memory, or cannot save to disk.

    Nothing is known about whether the last write was applied. Its words hold no credentials.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """One incarnation of a worker, as it describes itself at each heartbeat.

    ``address`` is host:port of its gRPC service, ``http_address`` of its health and metrics (None: it has none).
    ``model`` is the first served name, ``model_digest`` tells weights apart. ``started_at`` is in Unix seconds.
    ``scheduling_policy`` is the setting's value; empty: a worker of an older version, which does not say.
    """

    worker: WorkerId
    role: Role
    epoch: Epoch
    address: str
    layout: str
    numerics: str
    model: str
    model_digest: str
    block_size: int
    num_blocks: int
    http_address: str | None = None
    load: Load = field(default_factory=Load)
    draining: bool = False
    started_at: float = 0.0
    scheduling_policy: str = ""

    @property
    def peer(self) -> Peer:
        return Peer(self.worker, self.epoch, self.address)


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffRecord:
    """How far one try of one request has come, and between whom. An epoch is None where there is no such side (yet)."""

    request: RequestId
    generation: Generation
    stage: Stage
    prefill_epoch: Epoch | None = None
    decode_epoch: Epoch | None = None

    @property
    def rank(self) -> int:
        return stage_rank(self.stage)

    @property
    def order(self) -> tuple[int, int]:
        """Writes of one request must go up in this."""
        return (self.generation, self.rank)


def stage_rank(stage: Stage) -> int:
    """A stage's place in a request's life. The terminal ones share the last place: whichever is first, stays."""
    living = [each for each in Stage if not each.is_terminal]
    return len(living) if stage.is_terminal else living.index(stage)


@dataclass(frozen=True, slots=True)
class Replaced:
    """The whole inventory was written anew; who follows the stream reads a Snapshot."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A worker's whole inventory as of ``sequence``; later events carry a higher one."""

    hashes: frozenset[BlockHash]
    sequence: int


InventoryChange = Stored | Evicted | Cleared | Snapshot
"""What a router is told."""


@dataclass(frozen=True, slots=True)
class InventoryEvent:
    """A change of one incarnation's inventory. ``sequence`` counts that incarnation's events without gaps, except that
    a Replaced may skip some."""

    epoch: Epoch
    sequence: int
    change: Stored | Evicted | Cleared | Replaced
    tier: str = DEVICE


@dataclass(frozen=True, slots=True)
class Joined:
    worker: WorkerId
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Left:
    worker: WorkerId
    epoch: Epoch


LedgerEvent = InventoryEvent | Joined | Left


def pack_hashes(hashes: Iterable[BlockHash]) -> bytes:
    return b"".join(hashes)


def unpack_hashes(data: bytes) -> tuple[BlockHash, ...]:
    """Raises RemoteProtocolError when ``data`` is not a whole number of hashes."""
    if len(data) % HASH_BYTES:
        raise RemoteProtocolError(f"{len(data)} bytes are no whole number of {HASH_BYTES}-byte block hashes")
    return tuple(BlockHash(data[at : at + HASH_BYTES]) for at in range(0, len(data), HASH_BYTES))


def merged(changes: Iterable[CacheChange], most_hashes: int) -> Iterator[CacheChange]:
    """The same changes in the same order, neighbours of one kind joined, none with more than ``most_hashes``."""
    kind: type[Stored] | type[Evicted] | None = None
    held: list[BlockHash] = []
    for change in changes:
        if kind is not None and not isinstance(change, kind):
            yield from _cut(kind, held, most_hashes)
            held = []
        if isinstance(change, Cleared):
            kind = None
            yield change
        else:
            kind = type(change)
            held.extend(change.hashes)
    if kind is not None:
        yield from _cut(kind, held, most_hashes)


def _cut(
    kind: type[Stored] | type[Evicted], hashes: Sequence[BlockHash], most_hashes: int
) -> Iterator[Stored | Evicted]:
    for start in range(0, len(hashes), most_hashes):
        yield kind(tuple(hashes[start : start + most_hashes]))


def encode_worker(record: WorkerRecord) -> bytes:
    load = record.load
    return _packed(
        {
            "worker": record.worker,
            "role": record.role.value,
            "epoch": record.epoch,
            "address": record.address,
            "http_address": record.http_address,
            "layout": record.layout,
            "numerics": record.numerics,
            "model": record.model,
            "model_digest": record.model_digest,
            "block_size": record.block_size,
            "num_blocks": record.num_blocks,
            "draining": record.draining,
            "started_at": float(record.started_at),
            "scheduling_policy": record.scheduling_policy,
            "load": {
                "num_running": load.num_running,
                "num_waiting": load.num_waiting,
                "num_waiting_tokens": load.num_waiting_tokens,
                "num_free_blocks": load.num_free_blocks,
                "num_blocks": load.num_blocks,
                "tokens_per_s": float(load.tokens_per_s),
                "num_soon_free_blocks": load.num_soon_free_blocks,
            },
        }
    )


def decode_worker(data: bytes) -> WorkerRecord:
    """Raises RemoteProtocolError on anything malformed. Unknown fields are those of a later version, and ignored."""
    record = _Fields(data)
    load = record.inner("load")
    return WorkerRecord(
        worker=WorkerId(record.text("worker")),
        role=record.one_of("role", Role),
        epoch=Epoch(record.text("epoch")),
        address=record.text("address"),
        http_address=record.text_or_none("http_address"),
        layout=record.text("layout"),
        numerics=record.text("numerics"),
        model=record.text("model"),
        model_digest=record.text("model_digest"),
        block_size=record.count("block_size"),
        num_blocks=record.count("num_blocks"),
        draining=record.flag("draining"),
        started_at=record.number("started_at"),
        scheduling_policy=record.text_or_none("scheduling_policy") or "",
        load=Load(
            num_running=load.count("num_running"),
            num_waiting=load.count("num_waiting"),
            num_waiting_tokens=load.count("num_waiting_tokens"),
            num_free_blocks=load.count("num_free_blocks"),
            num_blocks=load.count("num_blocks"),
            tokens_per_s=load.number("tokens_per_s"),
            num_soon_free_blocks=load.count_if_any("num_soon_free_blocks"),
        ),
    )


def encode_handoff(record: HandoffRecord) -> bytes:
    return _packed(
        {
            "request": record.request,
            "generation": record.generation,
            "stage": record.stage.value,
            "prefill_epoch": record.prefill_epoch,
            "decode_epoch": record.decode_epoch,
        }
    )


def decode_handoff(data: bytes) -> HandoffRecord:
    """Raises RemoteProtocolError on anything malformed."""
    record = _Fields(data)
    prefill, decode = record.text_or_none("prefill_epoch"), record.text_or_none("decode_epoch")
    return HandoffRecord(
        request=RequestId(record.text("request")),
        generation=Generation(record.count("generation")),
        stage=record.one_of("stage", Stage),
        prefill_epoch=None if prefill is None else Epoch(prefill),
        decode_epoch=None if decode is None else Epoch(decode),
    )


def encode_change(change: CacheChange) -> tuple[str, bytes]:
    """The kind and the hashes of a stream entry."""
    match change:
        case Stored(hashes):
            return "stored", pack_hashes(hashes)
        case Evicted(hashes):
            return "evicted", pack_hashes(hashes)
        case Cleared():
            return "cleared", b""


def decode_event(entry: Mapping[bytes, bytes]) -> LedgerEvent:
    """Reads one entry of the event stream. Raises RemoteProtocolError on anything malformed."""
    kind, epoch = _entry_text(entry, b"kind"), Epoch(_entry_text(entry, b"epoch"))
    if kind == "joined":
        return Joined(WorkerId(_entry_text(entry, b"worker")), epoch)
    if kind == "left":
        return Left(WorkerId(_entry_text(entry, b"worker")), epoch)
    digits = _entry_text(entry, b"sequence")
    if not (digits.isascii() and digits.isdigit()):
        raise RemoteProtocolError(f"a ledger event's sequence is {digits[:40]!r}, not a count")
    return InventoryEvent(epoch, int(digits), _decode_change(kind, entry), _entry_text(entry, b"tier"))


def _decode_change(kind: str, entry: Mapping[bytes, bytes]) -> Stored | Evicted | Cleared | Replaced:
    match kind:
        case "stored":
            return Stored(unpack_hashes(_entry(entry, b"hashes")))
        case "evicted":
            return Evicted(unpack_hashes(_entry(entry, b"hashes")))
        case "cleared":
            return Cleared()
        case "replaced":
            return Replaced()
    raise RemoteProtocolError(f"a ledger event of unknown kind {kind[:40]!r}")


def _entry(entry: Mapping[bytes, bytes], name: bytes) -> bytes:
    value = entry.get(name)
    if value is None:
        raise RemoteProtocolError(f"a ledger event lacks {name.decode()!r}")
    return value


def _entry_text(entry: Mapping[bytes, bytes], name: bytes) -> str:
    try:
        return _entry(entry, name).decode()
    except UnicodeDecodeError:
        raise RemoteProtocolError(f"a ledger event's {name.decode()!r} is not text") from None


def _packed(fields: dict[str, object]) -> bytes:
    packed = msgpack.packb(fields, buf_size=_USUAL_BYTES)
    assert isinstance(packed, bytes)
    return packed


class _Fields:
    """A msgpack map read field by field; whatever is missing or of another type raises RemoteProtocolError."""

    def __init__(self, data: bytes | dict[object, object]) -> None:
        self._fields = data if isinstance(data, dict) else _unpacked(data)

    def _get(self, name: str, is_right: Callable[[object], _T | None]) -> _T:
        found = is_right(self._fields.get(name))
        if found is None:
            raise RemoteProtocolError(f"a ledger record's {name!r} is missing or malformed")
        return found

    def text(self, name: str) -> str:
        return self._get(name, lambda value: value if isinstance(value, str) else None)

    def text_or_none(self, name: str) -> str | None:
        return None if self._fields.get(name) is None else self.text(name)

    def flag(self, name: str) -> bool:
        return self._get(name, lambda value: value if isinstance(value, bool) else None)

    def count(self, name: str) -> int:
        return self._get(name, lambda value: value if type(value) is int and value >= 0 else None)

    def count_if_any(self, name: str) -> int:
        """A field that older workers do not write."""
        return self.count(name) if name in self._fields else 0

    def number(self, name: str) -> float:
        return self._get(name, lambda value: value if isinstance(value, float) and math.isfinite(value) else None)

    def one_of(self, name: str, kind: Callable[[str], _T]) -> _T:
        try:
            return kind(self.text(name))
        except ValueError:
            raise RemoteProtocolError(f"a ledger record's {name!r} is of a kind unknown here") from None

    def inner(self, name: str) -> _Fields:
        return _Fields(self._get(name, lambda value: value if isinstance(value, dict) else None))


def _unpacked(data: bytes) -> dict[object, object]:
    try:
        fields = msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException) as error:
        raise RemoteProtocolError(f"a ledger record is not msgpack: {error}") from None
    if not isinstance(fields, dict):
        raise RemoteProtocolError("a ledger record is not a map")
    return fields
