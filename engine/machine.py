"""What the machine offers to an engine: memory, instruction sets. Reads /proc and cgroup files; changes nothing."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from engine.sizing import DeviceMemory

_CGROUP = Path("/sys/fs/cgroup")
_CONTEXT_BYTES = 768 << 20
"""What a process has on a GPU beside torch's memory: its context and the kernels' code, estimated generously."""


def device_memory(device: torch.device) -> DeviceMemory:
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(int(total), int(free), torch.cuda.memory_reserved(device) + _CONTEXT_BYTES)


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: free on the GPU, or available to this process's container or host."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    amounts = [_host_available()]
    limit, used = _read(_CGROUP / "memory.max"), _read(_CGROUP / "memory.current")
    if limit.isdigit() and used.isdigit():
        amounts.append(max(0, int(limit) - int(used) + _reclaimable()))
    return min(amounts)


def instruction_set(device: torch.device) -> str:
    """Names what decides how sums are split and rounded on this machine."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} sm{major}{minor}"
    flags = next((line for line in _read(Path("/proc/cpuinfo")).splitlines() if line.startswith("flags")), "").split()
    extra = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), *extra])


def _host_available() -> int:
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))


def _reclaimable() -> int:
    """Page cache that a container is charged for but that gives way: mapped checkpoints, mostly."""
    for line in _read(_CGROUP / "memory.stat").splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
