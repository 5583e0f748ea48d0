"""What every way of storing quantised weights offers, and the checks they share. Knows tensors by name and shape."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kernels.quantised import Matrix, ScaledMatrix
from proto.errors import CheckpointError


class Store(Protocol):
    """A checkpoint's tensors as they lie in its files."""

    def has(self, name: str) -> bool: ...

    def kind(self, name: str) -> str:
        """The stored type by safetensors' name (F8_E4M3, I32, ...); empty where there is no such tensor."""

    def stored(self, name: str) -> Tensor:
        """On the engine's device. Raises CheckpointError where it is missing."""

    def where(self, name: str) -> str:
        """The file of that tensor, for messages."""


class Scheme(Protocol):
    """How a checkpoint stores its linear maps. Its ``repr`` tells apart what the same tensors may mean."""

    @property
    def name(self) -> str:
        """As --quantization calls it."""

    def describe(self) -> str:
        """A few words for logs, errors and the numerics id."""

    def covers(self, store: Store, module: str) -> bool:
        """Whether the files hold ``module`` quantised. Others are plain, whatever config.json lists."""

    def num_bytes(self, module: str, rows: int, columns: int) -> int:
        """What one matrix takes in memory, as it is multiplied."""

    def matrix(self, store: Store, module: str, columns: int) -> Matrix:
        """Raises CheckpointError where tensors are missing or do not fit together."""


def shaped(store: Store, name: str, kind: torch.dtype | None, *shapes: tuple[int, ...]) -> Tensor:
    """The tensor ``name``, one of ``shapes`` (-1: any size), of type ``kind`` where it matters."""
    tensor = store.stored(name)
    fits = any(
        len(shape) == tensor.dim() and all(want in (-1, size) for want, size in zip(shape, tensor.shape, strict=True))
        for shape in shapes
    )
    if not fits or (kind is not None and tensor.dtype != kind):
        wanted = " or ".join(str(list(shape)).replace("-1", "any") for shape in shapes)
        raise CheckpointError(
            f"{store.where(name)}: tensor {name} is {tensor.dtype} {list(tensor.shape)}; "
            f"its quantisation asks for {f'{kind} ' if kind else ''}{wanted}."
        )
    return tensor


def scaled(
    store: Store, values: Tensor, scale_name: str, block: tuple[int, int] | None, *, input_scale: Tensor | None
) -> ScaledMatrix:
    """8-bit ``values [out, in]`` with the scales ``scale_name``: one in all, one per row, or one per block."""
    rows, columns = values.shape
    if block is not None:
        blocks = (-(-rows // block[0]), -(-columns // block[1]))
        scale = shaped(store, scale_name, None, blocks).float()
        return ScaledMatrix(values, scale, *block, quantises_inputs=False, input_scale=input_scale)
    scale = shaped(store, scale_name, None, (), (1,), (1, 1), (rows,), (rows, 1)).float()
    per_row = scale.reshape(-1, 1).expand(rows, 1).contiguous()
    return ScaledMatrix(values, per_row, 1, columns, quantises_inputs=False, input_scale=input_scale)


def bytes_of_scaled(rows: int, columns: int, block: tuple[int, int] | None) -> int:
    """Of one ``ScaledMatrix``."""
    if block is None:
        return rows * columns + 4 * rows
    return rows * columns + 4 * -(-rows // block[0]) * -(-columns // block[1])


def bytes_of_coded(rows: int, columns: int, bits: int, group_size: int, *, has_zeros: bool) -> int:
    """Of one ``CodedMatrix``, its scales in 16 bits."""
    codes = columns if bits == 8 else -(-columns // 64) * 32
    return rows * (codes + -(-columns // group_size) * (3 if has_zeros else 2))
