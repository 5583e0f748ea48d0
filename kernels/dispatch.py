"""Which implementation of the maths runs: one choice, made at start, and then passed along as a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import reference


@dataclass(frozen=True, slots=True)
class Kernels:
    """The operations of a step; each has the signature, shapes and meaning of its namesake in ``kernels.reference``.

    ``name`` goes into a worker's numerics id.
    """

    name: str
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    write_kv: Callable[[Tensor, int, Tensor, Tensor, Tensor], None]
    attend_decode: Callable[[Tensor, Tensor, int, Tensor, Tensor, int | None, float], Tensor]
    attend_chunk: Callable[[Tensor, Tensor, int, Tensor, int, int | None, float], Tensor]


REFERENCE = Kernels(
    name="torch",
    linear=reference.linear,
    rms_norm=reference.rms_norm,
    rotate=reference.rotate,
    write_kv=reference.write_kv,
    attend_decode=reference.attend_decode,
    attend_chunk=reference.attend_chunk,
)


def choose(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The kernels for models of ``dtype`` on ``device``."""
    return REFERENCE
