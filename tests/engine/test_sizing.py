"""The arithmetic of KV memory and step limits."""

from __future__ import annotations

from typing import Any

import pytest

from engine.sizing import (
    DEFAULT_CPU_BYTES,
    GIB,
    GRAPH_BYTES,
    DeviceMemory,
    Room,
    StepLimits,
    check_weights,
    device_room,
    graph_bytes,
    make_room,
    step_limits,
    wanted_length,
)
from proto.errors import DoesNotFit, SettingsError
from proto.layout import KvLayout
from proto.settings import CacheSettings, SchedulerSettings

LAYOUT = KvLayout(num_layers=32, block_size=16, kv_heads=8, head_dim=128, dtype="bfloat16", model_digest="m")
BLOCK = 2 << 20
assert LAYOUT.block_bytes == BLOCK


def room(max_model_len: int | None = None, available: int = 64 * GIB, device: str = "cpu", **cache: Any) -> Room:
    return make_room(
        LAYOUT,
        CacheSettings(**cache),
        StepLimits(max_num_seqs=4, max_num_batched_tokens=2048),
        max_model_len=max_model_len,
        max_context=131_072,
        available=available,
        device=device,
    )


def test_blocks_given_outright() -> None:
    assert room(1600, num_gpu_blocks_override=100, kv_cache_memory_bytes=1).num_blocks == 100
    assert room(1600, kv_cache_memory_bytes=100 * BLOCK + 5).num_blocks == 100


def test_a_length_that_is_not_given_is_fitted() -> None:
    for auto in (None, -1):
        found = room(auto, num_gpu_blocks_override=100)
        assert found.max_model_len == 1600
        assert "lowered from 131072" in found.reason
    assert room(num_gpu_blocks_override=10_000).max_model_len == 131_072


def test_a_length_that_is_given_and_too_long_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(DoesNotFit, match=r"1601 tokens needs 101 blocks x 2,097,152 bytes.*100 blocks.*At most 1600"):
        room(1601, num_gpu_blocks_override=100)
    assert room(1600, num_gpu_blocks_override=100).max_model_len == 1600


def test_what_captured_steps_take() -> None:
    assert graph_bytes((), 1000, LAYOUT, 4096, 50) == 0
    # Inputs, logits and what lies between for the largest; something for each graph; a block for the padding.
    assert graph_bytes((1, 2, 8), 1000, LAYOUT, 4096, 50) == 8 * (1000 + 256 * 8 + 200) + 3 * GRAPH_BYTES + BLOCK


def test_not_one_block() -> None:
    with pytest.raises(DoesNotFit, match="2,097,152 bytes"):
        room(kv_cache_memory_bytes=BLOCK - 1)


def test_cpu_takes_a_modest_share_by_default() -> None:
    assert room().num_blocks == DEFAULT_CPU_BYTES // BLOCK
    assert room(512).num_blocks == 4 * 32  # four requests of full length are enough
    assert room(available=GIB, gpu_memory_utilization=0.5).num_blocks == GIB // 2 // BLOCK
    assert room(65_536).num_blocks == 4096  # asked for explicitly, so one such request must fit
    with pytest.raises(DoesNotFit):
        room(65_536, available=4 * GIB)


def test_a_gpu_takes_what_its_share_leaves() -> None:
    assert room(device="cuda", available=10 * GIB).num_blocks == 5120


def test_wanted_length() -> None:
    assert wanted_length(None, 1024) == wanted_length(-1, 1024) == 1024
    assert wanted_length(5, 1024) == 5
    for wrong in (0, -2, 1025):
        with pytest.raises(SettingsError, match="max_model_len"):
            wanted_length(wrong, 1024)


def test_step_limits() -> None:
    assert step_limits(SchedulerSettings(), "cpu", 4096) == StepLimits(128, 2048)
    assert step_limits(SchedulerSettings(), "cuda", 4096) == StepLimits(256, 8192)
    assert step_limits(SchedulerSettings(max_num_batched_tokens=32), "cpu", 4096) == StepLimits(32, 32)
    assert step_limits(SchedulerSettings(max_num_seqs=5000), "cpu", 4096) == StepLimits(5000, 5000)
    whole = SchedulerSettings(enable_chunked_prefill=False)
    assert step_limits(whole, "cpu", 4096) == StepLimits(128, 4096)
    with pytest.raises(SettingsError, match="chunked prefill"):
        step_limits(SchedulerSettings(enable_chunked_prefill=False, max_num_batched_tokens=100), "cpu", 4096)
    with pytest.raises(SettingsError, match="max_num_seqs"):
        step_limits(SchedulerSettings(max_num_seqs=64, max_num_batched_tokens=32), "cpu", 4096)


def test_weights_against_memory() -> None:
    num = 7_000_000_000
    check_weights(num, 2 * num, "bfloat16", 2 * num, "cpu", "")
    with pytest.raises(DoesNotFit, match=r"7,000,000,000 parameters x 2 bytes \(bfloat16\) = 13\.04 GiB; 8\.00 GiB"):
        check_weights(num, 2 * num, "bfloat16", 8 * GIB, "cpu", "")
    with pytest.raises(DoesNotFit, match=r"x 0\.571 bytes \(awq\) = 3\.73 GiB.*take a smaller model or wait\."):
        check_weights(num, 4 * num // 7, "awq", 3 * GIB, "cuda", " or wait")


def test_workers_that_share_a_gpu_get_what_their_shares_say() -> None:
    gpu, weights, step = 80 * GIB, 16 * GIB, 2 * GIB
    alone = DeviceMemory(gpu, free=gpu - weights, own=weights)
    beside = DeviceMemory(gpu, free=gpu // 2 - weights, own=weights)
    assert device_room(alone, 0.5, step) == gpu // 2 - weights - step
    assert device_room(beside, 0.5, step) == gpu // 2 - weights - step, "the other's memory is not counted twice"
    assert device_room(beside, 0.9, step) == beside.free - step, "never more than is free"
    assert device_room(beside, 0.1, step) == 0
