"""Records survive the trip through bytes, and no bytes do more harm than one named error."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.ledger.records import (
    HandoffRecord,
    InventoryEvent,
    Joined,
    Left,
    Replaced,
    WorkerRecord,
    decode_event,
    decode_handoff,
    decode_worker,
    encode_change,
    encode_handoff,
    encode_worker,
    merged,
    stage_rank,
)
from proto.control import Load, Role
from proto.errors import RemoteProtocolError
from proto.ids import BlockHash, Epoch, Generation, RequestId, WorkerId
from proto.inventory import Cleared, Evicted, Stored
from proto.lifecycle import Stage
from tests.support.ledger import Inventory, blocks, handoff, worker_record

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
COUNT = st.integers(0, 2**40)
HASHES = st.lists(st.binary(min_size=16, max_size=16).map(BlockHash), max_size=6).map(tuple)
CHANGES = st.one_of(HASHES.map(Stored), HASHES.map(Evicted), st.just(Cleared()))
LOADS = st.builds(Load, COUNT, COUNT, COUNT, COUNT, COUNT, st.floats(0, 1e9), COUNT)
WORKERS = st.builds(
    WorkerRecord,
    worker=TEXT.map(WorkerId),
    role=st.sampled_from(Role),
    epoch=TEXT.map(Epoch),
    address=TEXT,
    http_address=st.none() | TEXT,
    layout=TEXT,
    numerics=TEXT,
    model=TEXT,
    model_digest=TEXT,
    block_size=COUNT,
    num_blocks=COUNT,
    load=LOADS,
    draining=st.booleans(),
    started_at=st.floats(0, 1e12),
    scheduling_policy=st.sampled_from(["", "fcfs", "priority"]),
)
HANDOFFS = st.builds(
    HandoffRecord,
    request=TEXT.map(RequestId),
    generation=COUNT.map(Generation),
    stage=st.sampled_from(Stage),
    prefill_epoch=st.none() | TEXT.map(Epoch),
    decode_epoch=st.none() | TEXT.map(Epoch),
)


@given(WORKERS)
def test_a_worker_record_reads_back_as_it_was(record: WorkerRecord) -> None:
    assert decode_worker(encode_worker(record)) == record


@given(HANDOFFS)
def test_a_handoff_record_reads_back_as_it_was(record: HandoffRecord) -> None:
    assert decode_handoff(encode_handoff(record)) == record


@given(st.binary(max_size=64), st.sampled_from([decode_worker, decode_handoff]))
def test_random_bytes_are_refused_by_name(data: bytes, decode: Callable[[bytes], object]) -> None:
    with pytest.raises(RemoteProtocolError):
        decode(data)


@given(st.data())
def test_a_damaged_record_is_read_or_refused_but_never_worse(data: st.DataObject) -> None:
    good = bytearray(encode_worker(worker_record()))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        record = decode_worker(bytes(good))
    except RemoteProtocolError:
        return
    assert isinstance(record.load.num_running, int)
    assert record.block_size >= 0


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("worker", 3),
        ("role", "judge"),
        ("epoch", None),
        ("block_size", -1),
        ("block_size", True),
        ("num_blocks", 1.5),
        ("draining", 1),
        ("started_at", float("nan")),
        ("load", []),
        ("load", {}),
        ("http_address", b"bytes"),
    ],
)
def test_a_field_of_the_wrong_type_is_refused_by_its_name(name: str, wrong: object) -> None:
    fields = msgpack.unpackb(encode_worker(worker_record()))
    fields[name] = wrong
    with pytest.raises(RemoteProtocolError, match=name if wrong != {} else "num_running"):
        decode_worker(msgpack.packb(fields))


def test_what_an_older_worker_does_not_write_is_not_missed() -> None:
    fields = msgpack.unpackb(encode_worker(dataclasses.replace(worker_record(), scheduling_policy="fcfs")))
    del fields["scheduling_policy"], fields["load"]["num_soon_free_blocks"]
    assert decode_worker(msgpack.packb(fields)) == worker_record()


def test_fields_of_a_later_version_are_ignored() -> None:
    fields = msgpack.unpackb(encode_worker(worker_record())) | {"colour": "blue"}
    assert decode_worker(msgpack.packb(fields)) == worker_record()


@pytest.mark.parametrize("not_a_map", [[1, 2], "text", 7, None])
def test_a_record_that_is_not_a_map_is_refused(not_a_map: object) -> None:
    with pytest.raises(RemoteProtocolError, match="not a map"):
        decode_worker(msgpack.packb(not_a_map))


def test_events_are_read_from_their_flat_fields() -> None:
    inventory = {b"epoch": b"e", b"sequence": b"7", b"tier": b"device"}
    stored = inventory | {b"kind": b"stored", b"hashes": b"".join(blocks(1, 2))}
    assert decode_event(stored) == InventoryEvent(Epoch("e"), 7, Stored(blocks(1, 2)))
    assert decode_event(stored | {b"kind": b"evicted"}) == InventoryEvent(Epoch("e"), 7, Evicted(blocks(1, 2)))
    assert decode_event(inventory | {b"kind": b"cleared"}) == InventoryEvent(Epoch("e"), 7, Cleared())
    assert decode_event(inventory | {b"kind": b"replaced"}) == InventoryEvent(Epoch("e"), 7, Replaced())
    member = {b"epoch": b"e", b"worker": b"d0"}
    assert decode_event(member | {b"kind": b"joined"}) == Joined(WorkerId("d0"), Epoch("e"))
    assert decode_event(member | {b"kind": b"left"}) == Left(WorkerId("d0"), Epoch("e"))


@pytest.mark.parametrize(
    "damage",
    [
        {b"kind": b"exploded"},
        {b"kind": b"\xff"},
        {b"sequence": b"-1"},
        {b"sequence": b"seven"},
        {b"sequence": "٧".encode()},
        {b"hashes": b"short"},
        {b"epoch": b"\xff\xfe"},
    ],
)
def test_a_damaged_event_is_refused(damage: dict[bytes, bytes]) -> None:
    good = {b"kind": b"stored", b"epoch": b"e", b"sequence": b"7", b"tier": b"device", b"hashes": b""}
    with pytest.raises(RemoteProtocolError):
        decode_event(good | damage)


@pytest.mark.parametrize("missing", [b"kind", b"epoch", b"sequence", b"tier", b"hashes"])
def test_an_event_without_a_field_is_refused(missing: bytes) -> None:
    entry = {b"kind": b"stored", b"epoch": b"e", b"sequence": b"7", b"tier": b"device", b"hashes": b""}
    del entry[missing]
    with pytest.raises(RemoteProtocolError, match=missing.decode()):
        decode_event(entry)


@given(CHANGES)
def test_a_change_reads_back_from_the_stream(change: Stored | Evicted | Cleared) -> None:
    kind, packed = encode_change(change)
    entry = {b"kind": kind.encode(), b"epoch": b"e", b"sequence": b"1", b"tier": b"device", b"hashes": packed}
    assert decode_event(entry) == InventoryEvent(Epoch("e"), 1, change)


@given(st.lists(CHANGES, max_size=12), st.integers(1, 5), st.sets(st.binary(min_size=16, max_size=16), max_size=4))
def test_merging_keeps_the_meaning_and_the_bound(
    changes: list[Stored | Evicted | Cleared], most: int, held: set[bytes]
) -> None:
    plain, joined = Inventory(), Inventory()
    plain.blocks = {BlockHash(each) for each in held}
    joined.blocks = set(plain.blocks)
    for change in changes:
        plain.apply(change)
    for change in merged(changes, most):
        assert isinstance(change, Cleared) or 1 <= len(change.hashes) <= most
        joined.apply(change)
    assert joined.blocks == plain.blocks


def test_merging_joins_neighbours_of_one_kind() -> None:
    changes = [Stored(blocks(1)), Stored(blocks(2)), Evicted(blocks(1)), Cleared(), Stored(blocks(3))]
    assert list(merged(changes, 256)) == [Stored(blocks(1, 2)), Evicted(blocks(1)), Cleared(), Stored(blocks(3))]


def test_stages_rank_in_the_order_of_a_life_and_terminal_ones_share_the_end() -> None:
    ranks = [stage_rank(stage) for stage in Stage]
    assert ranks == sorted(ranks)
    assert stage_rank(Stage.FINISHED) == stage_rank(Stage.ABORTED) == stage_rank(Stage.FAILED) == max(ranks)
    assert ranks.count(max(ranks)) == 3
    assert handoff("r", 2, Stage.RECEIVED).order > handoff("r", 1, Stage.FAILED).order


def test_records_are_values() -> None:
    record = worker_record()
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.draining = True  # type: ignore[misc]
    assert record.peer.address == "127.0.0.1:9000"


def test_records_need_no_redis_library() -> None:
    code = "import sys, kvtransfer.ledger.records; sys.exit('redis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
