"""Linear maps with weights of a model's own type, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.types import Linear


@dataclass(frozen=True, slots=True)
class DenseLinear:
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def rows(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)


def linear(parts: Sequence[Tensor], bias: Tensor | None) -> Linear:
    """The map ``x [tokens, in]`` to ``x @ weight [out, in].T + bias [out]``; ``parts`` are the weight, one below the
    other. They are copied: the caller may let go of what they lie in."""
    return DenseLinear(torch.cat(list(parts)), bias)
