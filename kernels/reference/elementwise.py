"""Norms, rotary embedding and gates in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, scaled by ``weight`` (broadcast over the leading dimensions).

    The mean is taken in float32, as the checkpoints were trained. ``weight`` may be float32 whatever ``x`` is.
    """
    if weight.dim() == 1 and x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of ``x [tokens, heads, head_dim]``; the halves of a head form the rotated pairs.

    ``cos`` and ``sin`` are float32 ``[tokens, 1, head_dim]``; the first half of ``sin`` is negated already.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def gate(x: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up``, of ``x [tokens, 2 * inner]`` that holds gate and then up. See ``ACTIVATIONS``."""
    left, right = x.chunk(2, -1)
    return ACTIVATIONS[activation](left).mul_(right)
