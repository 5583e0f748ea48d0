"""Decode steps as captured graphs: all of a forward pass's kernels are started by one call.

    rows of the step:   r0 r1 r2 r3 r4          graphs for 1, 2, 4, 8, 16, ... rows
    graph for 8 rows:   r0 r1 r2 r3 r4 -- -- -- padding: token 0 at position 0 of a block that nobody owns

A graph replays the same kernels on the same memory, so a step's inputs are copied to where its graph reads them. Tables
are as wide as the longest context, and attention finds each row's length on the device. Knows batches and tensors; of
CUDA only what ``Capture`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.batch import Row
from engine.facts import EngineFacts
from engine.model import Decoder, StepInputs
from engine.step_inputs import put_drawn
from kernels.types import Kernels, PagedKv, Ragged
from kernels.upload import upload_into
from proto.errors import SettingsError
from proto.settings import ModelSettings

LARGEST = 512


def plan(settings: ModelSettings, kernels: Kernels, max_num_seqs: int) -> tuple[int, ...]:
    """The batch sizes to capture; none where kernels cannot be captured or are not to be. Raises SettingsError."""
    if settings.enforce_eager or not kernels.is_capturable:
        return ()
    if not settings.cuda_graph_sizes:
        return default_sizes(max_num_seqs)
    wanted = {int(text) if text.isdecimal() else 0 for text in settings.cuda_graph_sizes}
    if not all(1 <= size <= max_num_seqs for size in wanted):
        raise SettingsError(
            f"cuda_graph_sizes are batch sizes from 1 to max_num_seqs ({max_num_seqs}), "
            f"got {', '.join(settings.cuda_graph_sizes)}.",
            param="cuda_graph_sizes",
        )
    return tuple(sorted(wanted))


def default_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """As vLLM's: 1, 2, 4, every eighth up to 256, then every sixteenth; and the largest batch there can be."""
    most = min(max_num_seqs, LARGEST)
    usual = (1, 2, 4, *range(8, 256, 8), *range(256, LARGEST, 16))
    return (*(size for size in usual if size < most), most)


class Capture(Protocol):
    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Does ``work``, whose tensors stay where they are, and returns what does it again."""


class CudaCapture:
    """Graphs of one device. They share the memory for what lies between inputs and outputs: one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        # Once without capturing: libraries choose and compile their kernels, which a capture cannot take.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process, say another engine's, may go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


@dataclass(frozen=True, slots=True)
class _Graph:
    """``columns`` int64 ``[4, rows]``: tokens, positions, blocks and offsets."""

    columns: Tensor
    replay: Callable[[], None]


class DecodeGraphs:
    """Graphs for steps of up to ``max(sizes)`` rows of one token each. ``spare_block`` is what padding writes to."""

    def __init__(
        self, model: Decoder, kv: PagedKv, facts: EngineFacts, sizes: Sequence[int], spare_block: int, capture: Capture
    ) -> None:
        self._model = model
        self._kv = kv
        self._block_size = facts.block_size
        self._spare_block = spare_block
        self._sizes = sorted(sizes)
        most, width = self._sizes[-1], -(-facts.max_model_len // facts.block_size)
        self._tables = _HostTables(most, width, spare_block)
        device = model.device
        self._table = torch.full((most, width), spare_block, dtype=torch.int64, device=device)
        self._query_starts = torch.arange(most + 1, device=device)
        self._logits = torch.empty((most, model.spec.vocab_size), dtype=torch.float32, device=device)
        # The largest first: the smaller ones then find their memory in its.
        self._graphs = {size: self._capture(size, capture) for size in reversed(self._sizes)}

    def takes(self, rows: Sequence[Row]) -> bool:
        return len(rows) <= self._sizes[-1] and all(len(row.tokens) == 1 for row in rows)

    def run(self, rows: Sequence[Row], drawn: Tensor | None) -> Tensor:
        """float32 logits ``[rows, vocab_size]``, valid until the next call. ``drawn``: as for ``flatten``."""
        size = next(size for size in self._sizes if size >= len(rows))
        graph = self._graphs[size]
        columns = np.zeros((4, size), dtype=np.int64)
        columns[2] = self._spare_block
        for place, row in enumerate(rows):
            index, offset = divmod(row.start, self._block_size)
            columns[:, place] = row.tokens[0], row.start, row.block_table[index], offset
        upload_into(graph.columns, columns)
        put_drawn(graph.columns[0], rows, drawn)
        table = self._tables.of(rows, size)
        upload_into(self._table[:size, : table.shape[1]], table)
        graph.replay()
        return self._logits[: len(rows)]

    def _capture(self, size: int, capture: Capture) -> _Graph:
        columns = torch.zeros((4, size), dtype=torch.int64, device=self._model.device)
        columns[2] = self._spare_block
        tokens, positions, blocks, offsets = columns
        batch = Ragged(
            query_starts=self._query_starts[: size + 1],
            positions=positions,
            block_table=self._table[:size],
            num_decode=size,
            decode_width=self._table.shape[1],
            chunks=(),
        )
        inputs = StepInputs(tokens, positions, blocks, offsets, batch, logit_rows=self._query_starts[:size])
        logits = self._logits[:size]

        def work() -> None:
            self._model.forward(inputs, self._kv, out=logits)

        return _Graph(columns, capture(work))


class _HostTables:
    """Block tables of the rows of the last step. A sequence mostly keeps its place, and its table only grows."""

    def __init__(self, most: int, width: int, spare_block: int) -> None:
        self._array = np.full((most, width), spare_block, dtype=np.int64)
        self._known: list[Sequence[int]] = [()] * most
        self._spare_block = spare_block

    def of(self, rows: Sequence[Row], size: int) -> np.ndarray:
        """``[size, as many blocks as any row has]``. Behind a row's own blocks lie those of an earlier one."""
        for place, row in enumerate(rows):
            table, known = row.block_table, self._known[place]
            if table != known:
                same = len(known) if table[: len(known)] == known else 0
                self._array[place, same : len(table)] = table[same:]
                self._known[place] = table
        for place in range(len(rows), size):
            self._array[place, 0] = self._spare_block
            self._known[place] = ()
        return self._array[:size, : max(len(row.block_table) for row in rows)]
