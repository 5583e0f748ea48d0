"""AWQ and GPTQ: 4-bit (GPTQ also 8-bit) codes in words of 32 bits, with a scale and a zero point per group.

AWQ packs along the outputs, in the order its kernels unpack (``WQLinear_GEMM``); GPTQ along the inputs, in order, and
may sort the inputs of a layer (``g_idx`` says which group each is in).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.quantisation.scheme import Store, bytes_of_coded, shaped
from kernels.quantised import CodedMatrix, pack
from proto.errors import CheckpointError

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where a word has the codes of its eight outputs."""

_ONES = {4: 0x11111111, 8: 0x01010101}
"""One in every code of a word. It was subtracted from whole words: a zero point of 0 borrowed from the next."""


@dataclass(frozen=True, slots=True)
class Awq:
    """``group_size`` -1: a whole row."""

    group_size: int
    name: str = "awq"

    def describe(self) -> str:
        return f"awq (4 bits, {_groups(self.group_size)})"

    def covers(self, store: Store, module: str) -> bool:
        return store.has(f"{module}.qweight")

    def num_bytes(self, module: str, rows: int, columns: int) -> int:
        return bytes_of_coded(rows, columns, 4, _size(self.group_size, columns), has_zeros=True)

    def matrix(self, store: Store, module: str, columns: int) -> CodedMatrix:
        size = _size(self.group_size, columns)
        groups = -(-columns // size)
        scale = shaped(store, f"{module}.scales", None, (groups, -1))
        rows = scale.shape[1]
        words = shaped(store, f"{module}.qweight", torch.int32, (columns, rows // 8))
        zeros = shaped(store, f"{module}.qzeros", torch.int32, (groups, rows // 8))
        codes = _in_awq_order(codes_of(words, 4)).T
        return grouped(codes, 4, scale, size, _in_awq_order(codes_of(zeros, 4)))


@dataclass(frozen=True, slots=True)
class Gptq:
    """``zero_offset`` 1: zero points are stored as one less than they mean, as in the format's first version."""

    bits: int
    group_size: int
    zero_offset: int
    name: str = "gptq"

    def describe(self) -> str:
        return f"gptq ({self.bits} bits, {_groups(self.group_size)})"

    def covers(self, store: Store, module: str) -> bool:
        return store.has(f"{module}.qweight")

    def num_bytes(self, module: str, rows: int, columns: int) -> int:
        return bytes_of_coded(rows, columns, self.bits, _size(self.group_size, columns), has_zeros=True)

    def matrix(self, store: Store, module: str, columns: int) -> CodedMatrix:
        size, per_word = _size(self.group_size, columns), 32 // self.bits
        groups = -(-columns // size)
        scale = shaped(store, f"{module}.scales", None, (groups, -1))
        rows = scale.shape[1]
        words = shaped(store, f"{module}.qweight", torch.int32, (columns // per_word, rows))
        zeros = shaped(store, f"{module}.qzeros", torch.int32, (groups, -(-rows // per_word)))
        zero = codes_of(zeros + self.zero_offset * _ONES[self.bits], self.bits)[:, :rows]
        codes, order = codes_of(words.T, self.bits), None
        if store.has(f"{module}.g_idx"):
            order = group_order(shaped(store, f"{module}.g_idx", None, (columns,)), size, f"{module}.g_idx")
        return grouped(codes if order is None else codes[:, order], self.bits, scale, size, zero, order)


def codes_of(words: Tensor, bits: int) -> Tensor:
    """The codes of ``words [n, m]`` (int32), the lowest bits first: uint8 ``[n, m * 32 / bits]``."""
    stored = words.contiguous().view(torch.uint8)
    return stored if bits == 8 else torch.stack((stored & 15, stored >> 4), -1).flatten(1)


def grouped(
    codes: Tensor, bits: int, scale: Tensor, group_size: int, zero: Tensor | None, order: Tensor | None = None
) -> CodedMatrix:
    """A ``CodedMatrix`` of ``codes [out, in]``; zero points that are all in the middle need no memory."""
    if zero is not None and bool((zero == 1 << (bits - 1)).all()):
        zero = None
    packed = pack(codes) if bits == 4 else codes.contiguous()
    zero = None if zero is None else zero.contiguous()
    return CodedMatrix(packed, bits, codes.shape[1], scale.contiguous(), group_size, zero, order=order)


def group_order(group_of: Tensor, size: int, name: str) -> Tensor | None:
    """The inputs sorted by ``group_of [in]``; None where they are sorted already. Raises CheckpointError where a group
    has not ``size`` of them."""
    in_order = torch.arange(group_of.shape[0], device=group_of.device) // size
    if torch.equal(group_of.long(), in_order):
        return None
    order = torch.argsort(group_of, stable=True)
    if not torch.equal(group_of[order].long(), in_order):
        raise CheckpointError(f"{name} does not have {size} inputs in every group.")
    return order


def _in_awq_order(codes: Tensor) -> Tensor:
    return codes.view(codes.shape[0], -1, 8)[:, :, _AWQ_ORDER].flatten(1)


def _size(group_size: int, columns: int) -> int:
    return columns if group_size == -1 else group_size


def _groups(group_size: int) -> str:
    return "a scale per row" if group_size == -1 else f"groups of {group_size}"
