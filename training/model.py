"""The network that is trained: Llama's architecture in plain torch, as small as a few megabytes. Knows no text.

It shares no code with the engine that serves it: if the two disagree about the architecture, the served answers are
wrong, and the tests say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_FUSED_FROM = 640
"""Rows of more tokens use the fused attention kernel."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a network; the defaults are the built-in model's."""

    vocab: int
    hidden: int = 192
    inner: int = 512
    layers: int = 5
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 50_000.0
    norm_eps: float = 1e-6
    context: int = 2048


class _Normed(torch.autograd.Function):
    """x / rms(x), with a backward pass in few sweeps over memory: on CPU those are what takes the time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (scale.square() / x.shape[-1] + eps).rsqrt().to(x.dtype)
        out: Tensor = x * scale
        ctx.save_for_backward(out, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        out, scale = ctx.saved_tensors
        (gradient,) = gradients
        along = (gradient * out).mean(-1, keepdim=True)
        return torch.addcmul(gradient, out, along, value=-1).mul_(scale), None


class Norm(nn.Module):
    """Root mean square norm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = _Normed.apply(x, self.eps)  # type: ignore[no-untyped-call]
        return normed * self.weight.to(x.dtype)


class Linear(nn.Linear):
    """Kept in float32, multiplied in the type of its input."""

    def __init__(self, inputs: int, outputs: int, std: float) -> None:
        super().__init__(inputs, outputs, bias=False)
        nn.init.normal_(self.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        std = shape.hidden**-0.5
        self.q_proj = Linear(shape.hidden, shape.heads * shape.head_dim, std)
        self.k_proj = Linear(shape.hidden, shape.kv_heads * shape.head_dim, std)
        self.v_proj = Linear(shape.hidden, shape.kv_heads * shape.head_dim, std)
        self.o_proj = Linear(shape.heads * shape.head_dim, shape.hidden, std / (2 * shape.layers) ** 0.5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        rows, length, _ = x.shape
        split = (rows, length, -1, self.shape.head_dim)
        q = _rotate(self.q_proj(x).view(split), cos, sin) * self.shape.head_dim**-0.5
        k = _rotate(self.k_proj(x).view(split), cos, sin)
        v = self.v_proj(x).view(split)
        kv, groups = self.shape.kv_heads, self.shape.heads // self.shape.kv_heads
        if length > _FUSED_FROM:
            return self._fused(q, k, v)
        # Query heads that share keys are one long matrix. For short rows on CPU: half the fused kernel's time.
        q = q.view(rows, length, kv, groups, -1).permute(0, 2, 3, 1, 4).reshape(rows * kv, groups * length, -1)
        k = k.permute(0, 2, 3, 1).reshape(rows * kv, -1, length)
        v = v.transpose(1, 2).reshape(rows * kv, length, -1)
        scores = torch.bmm(q, k).view(rows * kv, groups, length, length) + mask
        seen = torch.bmm(scores.softmax(-1).view(rows * kv, groups * length, length), v)
        seen = seen.view(rows, kv, groups, length, -1).permute(0, 3, 1, 2, 4).reshape(rows, length, -1)
        out: Tensor = self.o_proj(seen)
        return out

    def _fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same without scores in memory; ``q`` is already scaled. All are [rows, length, heads, dim]."""
        groups = self.shape.heads // self.shape.kv_heads
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
        out: Tensor = self.o_proj(seen.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        std = shape.hidden**-0.5
        self.gate_proj = Linear(shape.hidden, shape.inner, std)
        self.up_proj = Linear(shape.hidden, shape.inner, std)
        self.down_proj = Linear(shape.inner, shape.hidden, shape.inner**-0.5 / (2 * shape.layers) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden, shape.norm_eps)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Network(nn.Module):
    """Tokens to hidden states, and hidden states to logits by the embedding itself (tied). Computes in ``dtype``."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.dtype = dtype
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        nn.init.normal_(self.embed_tokens.weight, std=shape.hidden**-0.5)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden, shape.norm_eps)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Hidden states, normed [rows, length, hidden], of int64 tokens and positions [rows, length]."""
        cos, sin = (part.to(self.dtype) for part in _angles(positions, self.shape))
        x = self.embed_tokens(tokens).to(self.dtype)
        mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        out: Tensor = self.norm(x)
        return out

    def losses(self, tokens: Tensor, positions: Tensor, where: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropies, float32, of the next tokens ``labels`` at the flat indices ``where`` into rows x length."""
        hidden = self(tokens, positions).flatten(0, 1)[where]
        logits = functional.linear(hidden, self.embed_tokens.weight.to(hidden.dtype)).float()
        return functional.cross_entropy(logits, labels, reduction="none")


def _angles(positions: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [rows, length, 1, head_dim]."""
    half = shape.head_dim // 2
    rates = shape.rope_theta ** (-torch.arange(half, dtype=torch.float32, device=positions.device) / half)
    angles = (positions.float()[..., None] * rates).repeat(1, 1, 2)[:, :, None]
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + half). The turned copy is a product with a fixed matrix: one sweep instead of three."""
    half = x.shape[-1] // 2
    eye = torch.eye(half, dtype=x.dtype, device=x.device)
    nothing = torch.zeros_like(eye)
    turn = torch.cat((torch.cat((nothing, eye), 1), torch.cat((-eye, nothing), 1)))
    return torch.addcmul(x * cos, x @ turn, sin)
