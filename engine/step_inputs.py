"""From a ``StepBatch`` (numbers) to ``StepInputs`` (tensors): flattening, slot mapping, block tables.

batch rows:   r0 (1 token)  r1 (5 tokens)  r2 (1 token)
flattened:    r0  r2 | r1 r1 r1 r1 r1          decode rows first, then chunks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from engine.batch import Row, StepBatch
from engine.model import StepInputs
from kernels.types import ChunkSpan, Ragged
from kernels.upload import upload, upload_together


@dataclass(frozen=True, slots=True)
class Flattened:
    """``inputs`` with, per row of the batch, its row of logits: those after its last token.

    A row that samples nothing has them, too: they tell whether its keys and values are numbers, before others match
    them or get them.
    """

    inputs: StepInputs
    logit_row: tuple[int, ...]


def flatten(batch: StepBatch, block_size: int, device: torch.device, drawn: Tensor | None = None) -> Flattened:
    """``drawn``: the tokens of the batch before, on the device, for rows that follow them.

    Raises AssertionError where a row has no tokens or too short a block table: the scheduler's fault.
    """
    order = sorted(range(len(batch.rows)), key=lambda index: len(batch.rows[index].tokens) > 1)
    rows = [batch.rows[index] for index in order]
    num_decode = sum(len(row.tokens) == 1 for row in rows)
    positions = np.concatenate([np.arange(row.start, row.start + len(row.tokens)) for row in rows])
    tables = [_table(row, block_size) for row in rows]
    blocks = np.concatenate(
        [
            table[np.arange(row.start, row.start + len(row.tokens)) // block_size]
            for row, table in zip(rows, tables, strict=True)
        ]
    )
    ends = np.cumsum([len(row.tokens) for row in rows])
    starts = ends - [len(row.tokens) for row in rows]
    parts = (
        np.array(list(chain.from_iterable(row.tokens for row in rows)), dtype=np.int64),
        positions,
        blocks,
        positions % block_size,
        np.array([0, *ends]),
        np.array([row.start for row in rows]),
        _pad(tables),
        ends - 1,
    )
    tokens, places, blocks_there, offsets, query_starts, row_starts, table, logit_rows = upload_together(parts, device)
    put_drawn(tokens, rows, drawn)
    ragged = Ragged(
        query_starts=query_starts,
        positions=row_starts,
        block_table=table,
        num_decode=num_decode,
        decode_width=max((len(table) for table in tables[:num_decode]), default=0),
        chunks=tuple(
            ChunkSpan(int(start), int(end), row.start) for row, start, end in zip(rows, starts, ends, strict=True)
        )[num_decode:],
    )
    return Flattened(
        StepInputs(tokens, places, blocks_there, offsets, ragged, logit_rows), tuple(np.argsort(order).tolist())
    )


def put_drawn(tokens: Tensor, rows: Sequence[Row], drawn: Tensor | None) -> None:
    """Puts the tokens that ``rows`` follow in their places. Such rows have one token each, and only such come first."""
    following = [(place, row.follows) for place, row in enumerate(rows) if row.follows is not None]
    if following:
        assert drawn is not None, "there was no batch to follow"
        places, draws = upload(list(zip(*following, strict=True)), torch.int64, tokens.device)
        tokens.index_copy_(0, places, drawn.index_select(0, draws))


def _table(row: Row, block_size: int) -> np.ndarray:
    """The row's blocks, those of its own tokens the last ones."""
    assert row.tokens, "a row computes at least one token"
    needed = -(-(row.start + len(row.tokens)) // block_size)
    assert len(row.block_table) >= needed, f"{needed} blocks needed, {len(row.block_table)} given"
    return np.asarray(row.block_table[:needed], dtype=np.int64)


def _pad(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Shorter tables are filled up with their own first block: memory that is theirs to read."""
    width = max(len(table) for table in tables)
    padded = np.empty((len(tables), width), dtype=np.int64)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
        row[len(table) :] = table[0]
    return padded
