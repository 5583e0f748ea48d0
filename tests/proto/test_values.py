"""Ids, layouts, stages, errors: the small promises that the rest is built on."""

from __future__ import annotations

import dataclasses
import importlib
from itertools import pairwise
from pathlib import Path

import pytest

from proto import errors
from proto.ids import Epoch, Generation, RequestId, RequestIds, new_epoch, router_of, try_id
from proto.layout import KvLayout
from proto.lifecycle import TERMINAL, Stage, may_follow

ROOT = Path(__file__).parents[2]
LAYOUT = KvLayout(num_layers=3, block_size=16, kv_heads=2, head_dim=8, dtype="bfloat16", model_digest="d")


@pytest.mark.parametrize("name", ["proto", "service", "kernels", "engine", "kvtransfer", "prefill", "decode", "router"])
def test_folders_with_common_names_are_ours(name: str) -> None:
    file = importlib.import_module(name).__file__
    assert file is not None
    assert Path(file).is_relative_to(ROOT)


def test_request_ids_name_their_router_and_never_repeat() -> None:
    ids = RequestIds(Epoch("a.b"))
    made = [ids.next() for _ in range(100)]
    assert len(set(made)) == 100
    assert {router_of(each) for each in made} == {"a.b"}


def test_epochs_are_drawn_anew() -> None:
    assert len({new_epoch() for _ in range(100)}) == 100


def test_tries_of_a_request_have_names_of_their_own() -> None:
    request = RequestId("a.1")
    assert try_id(request, Generation(1)) != try_id(request, Generation(2))
    assert try_id(request, Generation(1)) != request


@pytest.mark.parametrize(("dtype", "bytes_per_head"), [("bfloat16", 8 * 2), ("float8_e4m3fn", 8 + 4)])
def test_spans_tile_a_block(dtype: str, bytes_per_head: int) -> None:
    at, layout = 0, dataclasses.replace(LAYOUT, dtype=dtype)
    for span in layout.spans():
        assert span.offset == at
        at += span.num_bytes
    assert at == layout.block_bytes == 16 * 3 * 2 * 2 * bytes_per_head


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 4},
        {"block_size": 32},
        {"kv_heads": 1},
        {"head_dim": 4},
        {"dtype": "float16"},
        {"dtype": "float8_e4m3fn"},
        {"model_digest": "e"},
    ],
)
def test_any_difference_shows_in_the_fingerprint(change: dict[str, object]) -> None:
    other = dataclasses.replace(LAYOUT, **change)  # type: ignore[arg-type]
    assert other.fingerprint() != LAYOUT.fingerprint()
    assert dataclasses.replace(LAYOUT).fingerprint() == LAYOUT.fingerprint()


def test_nothing_follows_an_end() -> None:
    assert not any(may_follow(end, stage) for end in TERMINAL for stage in Stage)


@pytest.mark.parametrize("stage", [stage for stage in Stage if stage not in TERMINAL])
def test_every_living_stage_may_end_or_begin_again(stage: Stage) -> None:
    for following in (Stage.ABORTED, Stage.FAILED, Stage.ROUTED):
        assert may_follow(stage, following)
    assert not may_follow(stage, Stage.RECEIVED)


def test_both_ways_through_the_stages() -> None:
    handed_over = [Stage.RECEIVED, Stage.ROUTED, Stage.QUEUED, Stage.PREFILLING, Stage.STREAMING, Stage.SEALED]
    handed_over += [Stage.ADOPTED, Stage.DECODING, Stage.FINISHED]
    local = [Stage.RECEIVED, Stage.ROUTED, Stage.QUEUED, Stage.PREFILLING, Stage.DECODING, Stage.FINISHED]
    for way in (handed_over, local):
        assert all(may_follow(stage, following) for stage, following in pairwise(way))


def subclasses(cls: type[errors.TandemError]) -> set[type[errors.TandemError]]:
    return {cls}.union(*(subclasses(each) for each in cls.__subclasses__()))


def test_every_error_is_in_the_tree_that_its_module_draws() -> None:
    assert errors.__doc__ is not None
    drawn = {word for word in errors.__doc__.replace("─", " ").split() if word.isidentifier()}
    own = {cls for cls in subclasses(errors.TandemError) if cls.__module__ == "proto.errors"}
    assert {cls.__name__ for cls in own} <= drawn


def test_whose_fault_it_is_shows_in_the_status() -> None:
    for cls in subclasses(errors.TandemError):
        if issubclass(cls, errors.UserError):
            assert 400 <= cls.status < 500 or cls is errors.NotSupported
        elif issubclass(cls, errors.LocalFault):
            assert cls.status == 500
