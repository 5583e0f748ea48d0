"""Where things are measured: a device, sizes, a clock, and what the device itself can do."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bench.gpu.sizes import Sizes
from engine.graphs import CudaCapture

Work = Callable[[], object]
_WARM_UP_S = 0.3


class Clock(Protocol):
    def seconds(self, works: Sequence[Work]) -> float:
        """The median time of one of ``works``, which take turns; their first runs do not count."""


class EventClock:
    """On a GPU: between two events around the replay of a captured graph, so that starting kernels costs nothing.

    What cannot be captured is called as it is.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        self._device = device
        self._repeats = repeats

    def seconds(self, works: Sequence[Work]) -> float:
        capture = CudaCapture(self._device)
        replays = [_replay(capture, work) for work in works]
        _warm_up(replays)
        spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        for _ in range(self._repeats):
            for replay in replays:
                span = (_event(), _event())
                span[0].record()
                replay()
                span[1].record()
                spans.append(span)
        torch.cuda.synchronize()
        return float(statistics.median(begin.elapsed_time(end) for begin, end in spans)) / 1000


def _warm_up(works: Sequence[Work]) -> None:
    """Long enough for the device's clocks to rise again: they fall while kernels are compiled."""
    began = time.perf_counter()
    while time.perf_counter() - began < _WARM_UP_S:
        for work in works:
            work()
        torch.cuda.synchronize()


def _replay(capture: CudaCapture, work: Work) -> Work:
    def run() -> None:
        work()

    run()
    torch.cuda.synchronize()
    try:
        return capture(run)
    except RuntimeError:
        torch.cuda.synchronize()
        return work


class WallClock:
    """On a CPU."""

    def __init__(self, repeats: int) -> None:
        self._repeats = repeats

    def seconds(self, works: Sequence[Work]) -> float:
        times = []
        for round_ in range(self._repeats + 1):
            for work in works:
                began = time.perf_counter()
                work()
                if round_ > 0:
                    times.append(time.perf_counter() - began)
        return statistics.median(times)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device did: bytes read and written by a large copy, operations of a large product in bfloat16."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class Lab:
    """``scratch``: a folder for what has to be a file."""

    device: torch.device
    sizes: Sizes
    clock: Clock
    ceilings: Ceilings
    scratch: Path

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def finish(self) -> None:
        """Waits until the device has done what is queued on it."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)


def open_lab(device: torch.device, sizes: Sizes, scratch: Path) -> Lab:
    clock = EventClock(device, sizes.repeats) if device.type == "cuda" else WallClock(sizes.repeats)
    return Lab(device, sizes, clock, _ceilings(device, sizes, clock), scratch)


def _ceilings(device: torch.device, sizes: Sizes, clock: Clock) -> Ceilings:
    copy_s = _copy_s(device, sizes.copy_bytes, clock)
    size = sizes.matrix
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    product_s = clock.seconds([lambda: a @ b])
    return Ceilings(2 * sizes.copy_bytes / copy_s, 2 * size**3 / product_s)


def _copy_s(device: torch.device, num_bytes: int, clock: Clock) -> float:
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return clock.seconds([lambda: target.copy_(source)])


def free_memory() -> None:
    """Gives the device back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def relative_error(found: Tensor, right: Tensor) -> float:
    """``|found - right| / |right|``, in float64."""
    wide = right.double()
    return float((found.double() - wide).norm() / wide.norm())


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
