"""Checkpoints in float8_e4m3fn of quant_method fp8: a scale per matrix, per row, or per block (DeepSeek's, Qwen's)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from engine.quantisation.scheme import Store, bytes_of_scaled, scaled, shaped
from kernels.quantised import FP8, ScaledMatrix

BLOCK = (128, 128)
"""The rows and columns that share a scale, where blocks do."""


@dataclass(frozen=True, slots=True)
class Fp8:
    """``is_static``: activations are scaled by a number of the checkpoint's, and not by their own largest."""

    block: tuple[int, int] | None
    is_static: bool
    name: str = "fp8"

    def describe(self) -> str:
        sharing = "a scale per row or matrix" if self.block is None else f"blocks of {self.block[0]}x{self.block[1]}"
        return f"fp8 ({sharing}{', fixed input scales' if self.is_static else ''})"

    def covers(self, store: Store, module: str) -> bool:
        return store.kind(f"{module}.weight").startswith("F8_")

    def num_bytes(self, module: str, rows: int, columns: int) -> int:
        return bytes_of_scaled(rows, columns, self.block)

    def matrix(self, store: Store, module: str, columns: int) -> ScaledMatrix:
        values = shaped(store, f"{module}.weight", FP8, (-1, columns))
        # DeepSeek's name says inverse; it multiplies like the other.
        inverse = f"{module}.weight_scale_inv"
        name = inverse if store.has(inverse) else f"{module}.weight_scale"
        fixed = None
        if self.is_static:
            fixed = shaped(store, f"{module}.input_scale", None, (), (1,), (1, 1)).to(torch.float32).reshape(())
        return replace(scaled(store, values, name, self.block, input_scale=fixed), quantises_inputs=True)
