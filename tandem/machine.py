"""What this machine has, and each local worker's share of it. Imports no torch: the workers will."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from engine.cores import usable_cores
from proto.settings import EngineSettings


@dataclass(frozen=True, slots=True)
class Machine:
    """``cores`` this process may use; ``gpus`` as CUDA_VISIBLE_DEVICES names them."""

    cores: int
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Share:
    """One worker's part: its settings, and what its environment needs beyond them."""

    engine: EngineSettings
    environ: Mapping[str, str]


def this_machine(environ: Mapping[str, str] = os.environ, drivers: Path = Path("/proc/driver/nvidia/gpus")) -> Machine:
    """Cores by affinity and cgroup limit; GPUs by CUDA_VISIBLE_DEVICES if set, else all that NVIDIA's driver lists."""
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        gpus = tuple(gpu.strip() for gpu in named.split(",") if gpu.strip() not in ("", "-1"))
    else:
        gpus = tuple(str(number) for number in range(len(list(drivers.iterdir())))) if drivers.is_dir() else ()
    return Machine(usable_cores(), gpus)


def threads_per_worker(cores: int, num_workers: int) -> int:
    """Prefill and decode workers are busy at the same time, so none gets cores that another computes on."""
    return max(1, cores // max(1, num_workers))


def shares(machine: Machine, engine: EngineSettings, num_workers: int) -> list[Share]:
    """Each worker's settings. GPUs go round; workers on one device split its memory and, on CPU, the cores.

    ``threads``, ``kv_cache_memory_bytes`` and ``num_gpu_blocks_override`` are per worker already, and stay as given.
    """
    gpus = machine.gpus if engine.model.device != "cpu" else ()
    threads = engine.model.threads or threads_per_worker(machine.cores, num_workers)
    made = []
    for number in range(num_workers):
        gpu = gpus[number % len(gpus)] if gpus else None
        on_same_device = len(range(number % len(gpus), num_workers, len(gpus))) if gpus else num_workers
        cache = replace(
            engine.cache, gpu_memory_utilization=max(0.01, engine.cache.gpu_memory_utilization / on_same_device)
        )
        made.append(
            Share(
                replace(engine, model=replace(engine.model, threads=threads), cache=cache),
                {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu},
            )
        )
    return made
