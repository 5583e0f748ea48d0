"""Plain weights rounded as they are read, one matrix at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.quantisation.scheme import bytes_of_coded, bytes_of_scaled
from kernels.quantised import FP8, Matrix
from kernels.reference.quantised import quantise_nf4, quantise_rows

_GROUP = 64
"""Of nf4: bitsandbytes' default."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """One way to round; ``num_bytes(rows, columns)`` is what a matrix then takes."""

    name: str
    words: str
    round: Callable[[Tensor], Matrix]
    num_bytes: Callable[[int, int], int]

    def describe(self) -> str:
        return f"{self.name} ({self.words}, rounded at load)"


FP8_ROWS = Rounding(
    "fp8",
    "a scale per row",
    lambda weight: quantise_rows(weight, FP8, quantises_inputs=True),
    lambda rows, columns: bytes_of_scaled(rows, columns, None),
)
INT8_ROWS = Rounding(
    "int8",
    "a scale per row",
    lambda weight: quantise_rows(weight, torch.int8, quantises_inputs=False),
    lambda rows, columns: bytes_of_scaled(rows, columns, None),
)
NF4 = Rounding(
    "nf4",
    f"groups of {_GROUP}",
    lambda weight: quantise_nf4(weight, _GROUP),
    lambda rows, columns: bytes_of_coded(rows, columns, 4, _GROUP, has_zeros=False),
)

ROUNDINGS = {"fp8": FP8_ROWS, "int8": INT8_ROWS, "nf4": NF4, "bitsandbytes": NF4}
"""By what --quantization says. bitsandbytes rounds to nf4 where nobody says otherwise."""
