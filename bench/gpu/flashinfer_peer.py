"""FlashInfer's decode attention over the same blocks as ours, where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench.gpu.figures import Entry, Figure, Goal, Missing
from bench.gpu.lab import Lab, Work
from bench.gpu.sizes import BLOCK_SIZE

if TYPE_CHECKING:
    from bench.gpu.attention import Paged

_WORKSPACE_BYTES = 256 << 20
_WAYS = {"with tensor cores": True, "without tensor cores": False}


def measure(lab: Lab, case: str, paged: Paged, ours: float) -> Iterator[Entry]:
    """Decode of rows of equal length, whose time by our kernel is ``ours`` seconds."""
    if importlib.util.find_spec("flashinfer") is None:
        yield Missing(case, "flashinfer is not installed")
    elif not lab.is_gpu:
        yield Missing(case, "it needs a GPU")
    else:
        yield from compare(lab, case, paged, ours)


def compare(lab: Lab, case: str, paged: Paged, ours: float) -> Iterator[Entry]:
    """The faster of its two ways. One that fails, in whatever manner, is said to be missing."""
    found = []
    for name, has_tensor_cores in _WAYS.items():
        try:
            found.append((_seconds(lab, paged, has_tensor_cores=has_tensor_cores), name))
        except Exception as error:  # it compiles while it runs: an import, a compiler, an assertion of its own
            yield Missing(f"{case}, {name}", f"{type(error).__name__}: {error}")
    if found:
        best, name = min(found)
        yield Figure(case, best * 1e6, f"µs ({name})", best / ours, "our time", Goal(1.0))


def _seconds(lab: Lab, paged: Paged, *, has_tensor_cores: bool) -> float:
    """It knows one scale for all of fp8's numbers, here 1, where we read one for each token and head."""
    flashinfer = importlib.import_module("flashinfer")
    num_rows, width = len(paged.tables), len(paged.tables[0])
    _, heads, head_dim = paged.query.shape
    data = paged.kv.data

    def numbers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=lab.device)

    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=lab.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=has_tensor_cores)
    wrapper.plan(
        numbers([row * width for row in range(num_rows + 1)]),
        numbers([block for table in paged.tables for block in table]),
        numbers([(lab.sizes.decode_context - 1) % BLOCK_SIZE + 1] * num_rows),
        heads,
        data.shape[4],
        head_dim,
        BLOCK_SIZE,
        q_data_type=paged.query.dtype,
        kv_data_type=data.dtype,
    )

    def of(layer: int) -> Work:
        caches = (data[:, layer, 0], data[:, layer, 1])
        return lambda: wrapper.run(paged.query, caches)

    return lab.clock.seconds([of(layer) for layer in range(data.shape[1])])
