"""Rotary position embeddings: from a config's parameters to the angles of a step's tokens.

Scaling kinds: default, linear, dynamic, yarn, llama3; formulas as published with the models (RoFormer; position
interpolation; dynamic NTK; YaRN, arXiv:2309.00071; Llama 3.1).

Angles are computed once per step, in float32, for all layers: no table, so no largest position.

Dynamic NTK: a key is stored rotated, so its angle may depend on its own position only. Position p gets the frequencies
of a sequence of p + 1 tokens, which is what a cached generation gives it elsewhere; up to the original context this is
plain RoPE. (A single forward over a longer prompt that rotates every token by the final length differs from that beyond
the original context; it could not reuse a cached prefix.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """The parameters of one model's rotary embedding; those that ``kind`` does not use keep their defaults."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 0
    """The context the model was trained with, before scaling. For dynamic: where scaling sets in."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    """Multiplies cos and sin, so the logits of attention by its square."""
    truncate: bool = True

    @property
    def context_factor(self) -> float:
        """By how much scaling extends ``original_max_position``. (Llama 3.1 states the extended context itself.)"""
        return self.factor if self.kind in ("linear", "dynamic", "yarn") else 1.0


class Rope:
    """Angles for heads of ``head_dim`` on ``device``.

    ``one_by_one``: each token's apart, so that their last bits cannot depend on which tokens a step has (a vectorised
    cosine may round otherwise than the one that takes care of a tensor's end).
    """

    def __init__(self, spec: RopeSpec, head_dim: int, device: torch.device, *, one_by_one: bool = False) -> None:
        self._one_by_one = one_by_one
        self._spec = spec
        self._head_dim = head_dim
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self._exponents = exponents.to(device)
        self._inverse = _inverse_frequencies(spec, head_dim, exponents).to(device)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 ``[tokens, 1, head_dim]``, in the form ``kernels.reference.rotate`` takes."""
        if not self._one_by_one:
            return self._angles(positions)
        pairs = [self._angles(position) for position in positions[:, None]]
        return torch.cat([cos for cos, _ in pairs]), torch.cat([sin for _, sin in pairs])

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        inverse = self._inverse if self._spec.kind != "dynamic" else self._stretched(positions)
        angles = positions.float()[:, None] * inverse
        cos, sin = angles.cos() * self._spec.attention_factor, angles.sin() * self._spec.attention_factor
        return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]

    def _stretched(self, positions: Tensor) -> Tensor:
        """Dynamic NTK: inverse frequencies ``[tokens, head_dim / 2]`` of each token's own length."""
        spec, dim = self._spec, self._head_dim
        length = (positions + 1).clamp(min=spec.original_max_position)
        growth = spec.factor * length / spec.original_max_position - (spec.factor - 1)
        base = spec.theta * growth ** (dim / (dim - 2))
        return 1.0 / base[:, None] ** self._exponents


def _inverse_frequencies(spec: RopeSpec, head_dim: int, exponents: Tensor) -> Tensor:
    plain = 1.0 / spec.theta**exponents
    if spec.kind == "linear":
        return plain / spec.factor
    if spec.kind == "llama3":
        return _llama3(spec, plain)
    if spec.kind == "yarn":
        return _yarn(spec, head_dim, plain)
    return plain


def _llama3(spec: RopeSpec, plain: Tensor) -> Tensor:
    """Long waves are stretched by ``factor``, short ones kept, those between blended."""
    turns = spec.original_max_position * plain / (2 * math.pi)
    share = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    share = share.clamp(0, 1)
    return (1 - share) * plain / spec.factor + share * plain


def _yarn(spec: RopeSpec, head_dim: int, plain: Tensor) -> Tensor:
    """Dimensions that turn over beta_fast times in the original context are kept, those under beta_slow stretched."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(spec.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / spec.factor * stretched + plain * (1 - stretched)


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """YaRN's temperature where the config does not state it."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)
