"""The compiled kernels behind the signatures of ``kernels.reference``, for bfloat16.

Whatever shape a compiled kernel does not take goes to other kernels instead, so the choice shows in speed alone.
A row's result depends neither on its batch nor on how its prompt was cut into chunks: every sum has one fixed order.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from ctypes import c_float, c_int

import numpy as np
import torch
from torch import Tensor

from kernels import reference
from kernels.cpu import library
from kernels.cpu.library import Function, declare
from kernels.cpu.memory import empty_weights
from kernels.types import AttentionSpec, HeadNorm, Kernels, KernelsUnavailable, Linear, PagedKv, Places, Ragged

log = logging.getLogger(__name__)


class NativeKernels:
    """Functions of one loaded library. Uses as many threads as torch is set to."""

    def __init__(self, functions: ctypes.CDLL, other: Kernels) -> None:
        self._other = other
        self._pack = declare(functions, "pack_weight", 2, 3, c_int)
        self._linear = declare(functions, "linear", 4, 3, c_int)
        self._attend = declare(functions, "attend", 6, 10, c_float, c_int)
        self._rms_norm = declare(functions, "rms_norm", 3, 4, c_float, c_int)
        self._rotate = declare(functions, "rotate", 4, 4, c_int)
        self._gumbel = declare(functions, "gumbel", 2, 2, c_int)
        self._gate_silu = declare(functions, "gate_silu", 2, 2, c_int)

    def linear(self, parts: Sequence[Tensor], bias: Tensor | None) -> Linear:
        if parts[0].shape[1] % 32:
            return self._other.linear(parts, bias)
        return PackedLinear(self._pack, self._linear, parts, bias)

    def add_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x if residual is None else residual + x
        return self.rms_norm(total, weight, eps), total

    def rotate_and_write(self, qkv: Tensor, norm: HeadNorm | None, places: Places, kv: PagedKv, layer: int) -> Tensor:
        if qkv.shape[2] % 32 or not _is_dense(qkv):
            return self._other.rotate_and_write(qkv, norm, places, kv, layer)
        return reference.rotate_and_write_by(self.rms_norm, self.rotate, qkv, norm, places, kv, layer)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        tokens, heads, n = (x.shape[0], 1, x.shape[1]) if x.dim() == 2 else x.shape
        if n % 16 or not _is_dense(x) or weight.dtype != x.dtype:
            normed, _ = self._other.add_norm(x, None, weight, eps)
            return normed
        out = torch.empty(x.shape, dtype=x.dtype)
        threads = torch.get_num_threads()
        self._rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), tokens, heads, n, x.stride(0), eps, threads)
        return out

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tokens, heads, n = x.shape
        out = torch.empty(x.shape, dtype=x.dtype)
        threads = torch.get_num_threads()
        self._rotate(
            x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), tokens, heads, n, x.stride(0), threads
        )
        return out

    def gate(self, x: Tensor, activation: str) -> Tensor:
        tokens, width = x.shape
        if activation != "silu" or width % 32 or not x.is_contiguous():
            return self._other.gate(x, activation)
        out = torch.empty((tokens, width // 2), dtype=x.dtype)
        self._gate_silu(x.data_ptr(), out.data_ptr(), tokens, width // 2, torch.get_num_threads())
        return out

    def gumbel(self, keys: Sequence[int], vocab_size: int, device: torch.device) -> Tensor:
        """Equal to ``kernels.noise.gumbel`` up to the last bits of its logarithms, about ten times as fast."""
        packed = torch.from_numpy(np.array(keys, dtype=np.uint64).view(np.int64))
        out = torch.empty((len(keys), vocab_size))
        self._gumbel(packed.data_ptr(), out.data_ptr(), len(keys), vocab_size, torch.get_num_threads())
        return out

    def attend(self, query: Tensor, kv: PagedKv, layer: int, batch: Ragged, spec: AttentionSpec) -> Tensor:
        _, heads, head_dim = query.shape
        data = kv.data
        block_size, kv_heads = data.shape[3:5]
        takes_shape = not (head_dim % 32 or head_dim > 256 or block_size % 16) and _is_dense(query)
        if not takes_shape or kv.scales is not None or spec.soft_cap is not None:
            return self._other.attend(query, kv, layer, batch, spec)
        out = torch.empty(query.shape, dtype=query.dtype)
        self._attend(
            query.data_ptr(),
            data[0, layer].data_ptr(),
            out.data_ptr(),
            batch.query_starts.data_ptr(),
            batch.positions.data_ptr(),
            batch.block_table.data_ptr(),
            query.stride(0),
            data.stride(0),
            data.stride(2),
            batch.block_table.shape[1],
            batch.block_table.shape[0],
            heads,
            kv_heads,
            head_dim,
            block_size,
            spec.window or 0,
            spec.scale,
            torch.get_num_threads(),
        )
        return out


class PackedLinear:
    """A matrix in the order in which tiles consume it; the original is not kept."""

    def __init__(self, pack: Function, multiply: Function, parts: Sequence[Tensor], bias: Tensor | None) -> None:
        columns = parts[0].shape[1]
        self._multiply = multiply
        self._rows = sum(part.shape[0] for part in parts)
        self._bias = bias
        self._packed = empty_weights((-(-self._rows // 32) * 2, columns // 2, 16, 2), parts[0].dtype)
        self._packed[self._rows // 16 :] = 0
        first = 0
        for part in parts:
            part = part.contiguous()
            pack(part.data_ptr(), self._packed.data_ptr(), first, part.shape[0], columns, torch.get_num_threads())
            first += part.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty((x.shape[0], self._rows), dtype=x.dtype)
        bias = None if self._bias is None else self._bias.data_ptr()
        status = self._multiply(
            x.data_ptr(),
            self._packed.data_ptr(),
            bias,
            out.data_ptr(),
            x.shape[0],
            self._rows,
            x.shape[1],
            torch.get_num_threads(),
        )
        if status:
            raise MemoryError("No memory for the scratch space of a matrix product.")
        return out

    def rows(self, index: Tensor) -> Tensor:
        return self._packed[index // 16, :, index % 16].flatten(1)


def load(other: Kernels) -> NativeKernels | None:
    """``other`` does what tiles do not take. None, with the reason logged, where the kernels cannot run."""
    if not library.AMX.runs_here():
        log.info("CPU kernels: none for this processor (they need AMX); using %s", other.name)
        return None
    try:
        functions = library.load(library.AMX)
    except KernelsUnavailable as reason:
        log.warning("CPU kernels: %s; using %s, which decodes at about half the speed", reason, other.name)
        return None
    if not functions.allow_tiles():
        log.info("CPU kernels: the system does not allow AMX to this process; using %s", other.name)
        return None
    return NativeKernels(functions, other)


def _is_dense(x: Tensor) -> bool:
    """Whether all but the first dimension lie without gaps."""
    return x.stride(-1) == 1 and (x.dim() == 2 or x.stride(1) == x.shape[2])
