"""Checkpoints that bitsandbytes has quantised: nf4 or fp4 in blocks, or int8 with a scale per row.

Its 4-bit codes lie two in a byte, the first one high, over the flattened matrix; their scales may themselves be
quantised (double quantisation), and are widened here. Of int8, activations stay as they are and no outliers are kept
apart, so results are near to, but not those of, LLM.int8().
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.quantisation.scheme import Store, bytes_of_coded, bytes_of_scaled, shaped
from kernels.quantised import CodedMatrix, Matrix, ScaledMatrix, pack
from proto.errors import CheckpointError

_STATES = ("nf4", "fp4")


@dataclass(frozen=True, slots=True)
class BitsAndBytes:
    """``bits``: 4 or 8."""

    bits: int
    name: str = "bitsandbytes"

    def describe(self) -> str:
        return f"bitsandbytes ({self.bits} bits)"

    def covers(self, store: Store, module: str) -> bool:
        return store.has(f"{module}.weight.absmax" if self.bits == 4 else f"{module}.SCB")

    def num_bytes(self, module: str, rows: int, columns: int) -> int:
        if self.bits == 8:
            return bytes_of_scaled(rows, columns, None)
        return bytes_of_coded(rows, columns, 4, 64, has_zeros=False) + rows * -(-columns // 64) * 2  # float32 scales

    def matrix(self, store: Store, module: str, columns: int) -> Matrix:
        if self.bits == 8:
            values = shaped(store, f"{module}.weight", torch.int8, (-1, columns))
            largest = shaped(store, f"{module}.SCB", None, (values.shape[0],))
            return ScaledMatrix(values, (largest.float() / 127)[:, None], 1, columns, quantises_inputs=False)
        return _coded(store, f"{module}.weight", columns)


def _coded(store: Store, name: str, columns: int) -> CodedMatrix:
    state_name = next((f"{name}.quant_state.bitsandbytes__{kind}" for kind in _STATES if _has(store, name, kind)), "")
    if not state_name:
        raise CheckpointError(f"{store.where(name)}: {name} has no quant_state of nf4 or fp4.")
    state = _read_state(store, state_name)
    rows, size = state.rows, state.block_size
    if state.columns != columns or columns % size or columns % 2:
        raise CheckpointError(
            f"{store.where(name)}: {name} is [{rows}, {state.columns}] in blocks of {size}; config.json asks for "
            f"{columns} inputs, and blocks that run over the end of a row are not supported."
        )
    stored = shaped(store, name, torch.uint8, (rows * columns // 2, 1), (1, rows * columns // 2))
    codes = torch.stack((stored.flatten() >> 4, stored.flatten() & 15), -1).view(rows, columns)
    scale = _block_scales(store, name, state).view(rows, columns // size)
    table = shaped(store, f"{name}.quant_map", None, (16,)).float()
    return CodedMatrix(pack(codes), 4, columns, scale.T.contiguous(), size, table=table)


@dataclass(frozen=True, slots=True)
class _State:
    rows: int
    columns: int
    block_size: int
    nested_block_size: int
    nested_offset: float


def _has(store: Store, name: str, kind: str) -> bool:
    return store.has(f"{name}.quant_state.bitsandbytes__{kind}")


def _read_state(store: Store, name: str) -> _State:
    """The JSON text that lies in a tensor of bytes."""
    try:
        entries = json.loads(bytes(shaped(store, name, torch.uint8, (-1,)).tolist()))
        rows, columns = entries["shape"]
        nested = int(entries.get("nested_blocksize", 0)), float(entries.get("nested_offset", 0.0))
        return _State(int(rows), int(columns), int(entries["blocksize"]), *nested)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{store.where(name)}: tensor {name} cannot be read: {error!r}") from error


def _block_scales(store: Store, name: str, state: _State) -> Tensor:
    blocks = state.rows * state.columns // state.block_size
    largest = shaped(store, f"{name}.absmax", None, (blocks,))
    if not state.nested_block_size:
        return largest.float()
    table = shaped(store, f"{name}.nested_quant_map", None, (256,)).float()
    groups = -(-blocks // state.nested_block_size)
    outer = shaped(store, f"{name}.nested_absmax", None, (groups,)).float()
    spread = outer.repeat_interleave(state.nested_block_size)[:blocks]
    return table[largest.int()] * spread + state.nested_offset
