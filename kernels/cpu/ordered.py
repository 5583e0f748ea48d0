"""Batch-invariant kernels behind the signatures of ``kernels.reference``, for float32 and bfloat16 on any CPU.

A row's result has the same bits whatever rows it is computed with, however its prompt is cut into chunks and on however
many threads. Between two processors with fused multiply-add it has too. Everything is computed in float32; what is
bfloat16 is widened before and rounded after.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int
from functools import partial

import torch
from torch import Tensor

from kernels import noise, reference
from kernels.cpu import library
from kernels.cpu.memory import empty_weights
from kernels.types import AttentionSpec, HeadNorm, Kernels, Linear, PagedKv, Places, Ragged

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.bfloat16)

_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_pytorch_tanh": 2}


class OrderedKernels:
    """Functions of one loaded library. Uses as many threads as torch is set to."""

    def __init__(self, functions: ctypes.CDLL) -> None:
        declare = library.declare
        self._panel_width = declare(functions, "panel_width", 0, 0)()
        self._pack = declare(functions, "pack_panels", 2, 3, c_int, c_int)
        self._linear = declare(functions, "ordered_linear", 4, 3, c_int, c_int)
        self._attend = declare(functions, "ordered_attend", 6, 10, c_float, c_float, c_int, c_int)
        self._rms_norm = declare(functions, "ordered_rms_norm", 3, 4, c_float, c_int)
        self._rotate = declare(functions, "ordered_rotate", 4, 4, c_int)
        self._gate = declare(functions, "ordered_gate", 2, 2, c_int, c_int)

    def linear(self, parts: Sequence[Tensor], bias: Tensor | None) -> Linear:
        return OrderedLinear(self._pack, self._linear, self._panel_width, parts, bias)

    def add_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x if residual is None else residual + x
        return self.rms_norm(total, weight, eps), total

    def rotate_and_write(self, qkv: Tensor, norm: HeadNorm | None, places: Places, kv: PagedKv, layer: int) -> Tensor:
        return reference.rotate_and_write_by(self.rms_norm, self.rotate, qkv, norm, places, kv, layer)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        tokens, heads, n = (x.shape[0], 1, x.shape[1]) if x.dim() == 2 else x.shape
        wide, scale = _wide(x), weight.expand(x.shape[1:]).float().contiguous()
        out = torch.empty(x.shape)
        threads = torch.get_num_threads()
        self._rms_norm(
            wide.data_ptr(), scale.data_ptr(), out.data_ptr(), tokens, heads, n, wide.stride(0), eps, threads
        )
        return out.to(x.dtype)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        wide, out = _wide(x), torch.empty(x.shape)
        threads = torch.get_num_threads()
        self._rotate(wide.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), *x.shape, wide.stride(0), threads)
        return out.to(x.dtype)

    def gate(self, x: Tensor, activation: str) -> Tensor:
        tokens, width = x.shape
        wide, out = x.float().contiguous(), torch.empty((tokens, width // 2))
        threads = torch.get_num_threads()
        self._gate(wide.data_ptr(), out.data_ptr(), tokens, width // 2, _ACTIVATIONS[activation], threads)
        return out.to(x.dtype)

    def attend(self, query: Tensor, kv: PagedKv, layer: int, batch: Ragged, spec: AttentionSpec) -> Tensor:
        _, heads, head_dim = query.shape
        assert head_dim <= MAX_HEAD_DIM, "checked when the kernels were chosen"
        data, table = kv.data[:, layer], batch.block_table
        if kv.scales is not None:  # fp8: the blocks of this step, widened, in the order of the table
            data = reference.widen_kv(kv, layer, table.reshape(-1))
            table = torch.arange(table.numel()).view(table.shape)
        block_size, kv_heads = data.shape[2:4]
        wide, out = _wide(query), torch.empty(query.shape)
        self._attend(
            wide.data_ptr(),
            data.data_ptr(),
            out.data_ptr(),
            batch.query_starts.data_ptr(),
            batch.positions.data_ptr(),
            table.data_ptr(),
            wide.stride(0),
            data.stride(0),
            data.stride(1),
            table.shape[1],
            table.shape[0],
            heads,
            kv_heads,
            head_dim,
            block_size,
            spec.window or 0,
            spec.scale,
            spec.soft_cap or 0.0,
            data.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
        return out.to(query.dtype)


class OrderedLinear:
    """A matrix in panels of as many columns as the sums of one pass have; the original is not kept."""

    def __init__(
        self,
        pack: library.Function,
        multiply: library.Function,
        panel_width: int,
        parts: Sequence[Tensor],
        bias: Tensor | None,
    ) -> None:
        columns = parts[0].shape[1]
        self._multiply = multiply
        self._panel_width = panel_width
        self._rows = sum(part.shape[0] for part in parts)
        self._bias = None if bias is None else bias.float()
        self._is_half = parts[0].dtype == torch.bfloat16
        self._packed = empty_weights((-(-self._rows // panel_width), columns, panel_width), parts[0].dtype)
        self._packed[self._rows // panel_width :] = 0
        first = 0
        for part in parts:
            whole, threads = part.contiguous(), torch.get_num_threads()
            pack(whole.data_ptr(), self._packed.data_ptr(), first, part.shape[0], columns, self._is_half, threads)
            first += part.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float().contiguous()
        out = torch.empty((x.shape[0], self._rows))
        status = self._multiply(
            wide.data_ptr(),
            self._packed.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            self._rows,
            x.shape[1],
            self._is_half,
            torch.get_num_threads(),
        )
        if status:
            raise MemoryError("No memory for the scratch space of a matrix product.")
        return out.to(x.dtype)

    def rows(self, index: Tensor) -> Tensor:
        return self._packed[index // self._panel_width, :, index % self._panel_width]


def gumbel(keys: Sequence[int], vocab_size: int, device: torch.device) -> Tensor:
    """As ``kernels.noise.gumbel``, a row at a time: its logarithms may round differently at the end of a tensor."""
    return torch.cat([noise.gumbel([key], vocab_size, device) for key in keys])


def make() -> Kernels:
    """Raises KernelsUnavailable where they cannot be compiled."""
    ordered = OrderedKernels(library.load(library.ordered()))
    return Kernels(
        name="ordered",
        linear=ordered.linear,
        add_norm=ordered.add_norm,
        rotate_and_write=ordered.rotate_and_write,
        gate=ordered.gate,
        attend=ordered.attend,
        draw=partial(reference.draw, gumbel=gumbel),
        is_batch_invariant=True,
    )


def _wide(x: Tensor) -> Tensor:
    """float32, all but the first dimension without gaps."""
    wide = x.float()
    return wide if wide[:1].is_contiguous() else wide.contiguous()
