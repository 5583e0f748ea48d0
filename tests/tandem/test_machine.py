"""How local workers share one machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from proto.settings import CacheSettings, EngineSettings, ModelSettings
from tandem.machine import Machine, shares, this_machine, threads_per_worker


@pytest.mark.parametrize(("cores", "workers", "threads"), [(2, 2, 1), (1, 4, 1), (16, 2, 8), (16, 3, 5), (8, 0, 8)])
def test_cores_are_split_and_nobody_gets_none(cores: int, workers: int, threads: int) -> None:
    assert threads_per_worker(cores, workers) == threads


def test_workers_on_one_device_split_its_memory_and_cores() -> None:
    first, second = shares(Machine(cores=8), EngineSettings(), 2)
    assert first == second
    assert first.engine.model.threads == 4
    assert first.engine.cache.gpu_memory_utilization == pytest.approx(0.46)
    assert first.environ == {}


def test_gpus_go_round_and_a_lone_worker_keeps_its_whole_gpu() -> None:
    made = shares(Machine(cores=8, gpus=("4", "5")), EngineSettings(), 3)
    assert [share.environ["CUDA_VISIBLE_DEVICES"] for share in made] == ["4", "5", "4"]
    assert [share.engine.cache.gpu_memory_utilization for share in made] == pytest.approx([0.46, 0.92, 0.46])


def test_on_cpu_the_gpus_do_not_matter() -> None:
    engine = EngineSettings(
        model=ModelSettings(device="cpu", threads=3), cache=CacheSettings(num_gpu_blocks_override=9)
    )
    (share,) = shares(Machine(cores=8, gpus=("0",)), engine, 1)
    assert share.environ == {}
    assert share.engine == engine, "what is given per worker stays as given"


def test_gpus_are_those_that_cuda_may_see(tmp_path: Path) -> None:
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / name).mkdir()
    assert this_machine({}, tmp_path).gpus == ("0", "1")
    assert this_machine({}, tmp_path / "none").gpus == ()
    assert this_machine({"CUDA_VISIBLE_DEVICES": "3, GPU-ab"}, tmp_path).gpus == ("3", "GPU-ab")
    assert this_machine({"CUDA_VISIBLE_DEVICES": ""}, tmp_path).gpus == ()
    assert this_machine({}, tmp_path).cores >= 1
