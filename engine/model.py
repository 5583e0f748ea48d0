"""One decoder for all families: a ``ModelSpec`` says which parts it has and of what size.

A forward pass is ragged: the tokens of all rows lie one after another, and only attention knows where rows begin.
Knows tensors and blocks; knows nothing of requests, schedules or sampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.families import ModelSpec
from engine.rope import Rope
from engine.weights import WeightSource
from kernels.quantised import Product
from kernels.reference import ACTIVATIONS, DenseLinear
from kernels.reference.quantised import dequantise
from kernels.types import AttentionSpec, HeadNorm, Kernels, Linear, PagedKv, Places, Ragged
from proto.errors import UnsupportedModel

_CPU_MLP_TOKENS = 512


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step as tensors (int64). ``batch`` says which tokens are whose.

    ``tokens``, ``positions``: [tokens]. ``blocks``, ``offsets``: [tokens], where each one's keys and values go.
    ``logit_rows``: which tokens' logits are wanted.
    """

    tokens: Tensor
    positions: Tensor
    blocks: Tensor
    offsets: Tensor
    batch: Ragged
    logit_rows: Tensor


class Attention:
    """Grouped-query attention over paged keys and values, with fused query, key and value projections."""

    def __init__(self, spec: ModelSpec, layer: int, source: WeightSource, kernels: Kernels) -> None:
        self._kernels = kernels
        self._layer = layer
        self._spec = AttentionSpec(spec.attention_scale, spec.windows[layer], spec.attention_soft_cap)
        self._heads, self._kv_heads, self._head_dim = spec.num_heads, spec.kv_heads, spec.head_dim
        name = f"model.layers.{layer}.self_attn"
        query, kv = spec.num_heads * spec.head_dim, spec.kv_heads * spec.head_dim
        parts = [f"{name}.{part}_proj" for part in "qkv"]
        self._qkv = _linear(kernels, source, parts, query + 2 * kv, spec.hidden_size, spec.qkv_bias)
        self._out = _linear(kernels, source, [f"{name}.o_proj"], spec.hidden_size, query, spec.o_bias)
        self._norm: HeadNorm | None = None
        if spec.qk_norm:
            q_norm, k_norm = (_norm(spec, source, f"{name}.{part}_norm", spec.head_dim) for part in "qk")
            weight = torch.cat(
                (q_norm.expand(spec.num_heads, spec.head_dim), k_norm.expand(spec.kv_heads, spec.head_dim))
            )
            self._norm = HeadNorm(weight, spec.norm_eps)

    def __call__(self, x: Tensor, batch: Ragged, places: Places, kv: PagedKv) -> Tensor:
        """``x [tokens, hidden]`` to the heads' outputs ``[tokens, heads * head_dim]``; writes the tokens' KV."""
        qkv = self._qkv(x).view(-1, self._heads + 2 * self._kv_heads, self._head_dim)
        query = self._kernels.rotate_and_write(qkv, self._norm, places, kv, self._layer)
        out = self._kernels.attend(query, kv, self._layer, batch, self._spec)
        return out.flatten(1)

    def project(self, heads: Tensor) -> Tensor:
        return self._out(heads)


class GatedMlp:
    """``down(activation(gate(x)) * up(x))``, with gate and up as one matrix."""

    def __init__(self, spec: ModelSpec, layer: int, source: WeightSource, kernels: Kernels) -> None:
        self._kernels = kernels
        if spec.activation not in ACTIVATIONS:
            raise UnsupportedModel(
                f"Activation {spec.activation!r} is not supported. Supported: {', '.join(ACTIVATIONS)}."
            )
        self._activation = spec.activation
        name, inner = f"model.layers.{layer}.mlp", spec.intermediate_size
        parts = [f"{name}.gate_proj", f"{name}.up_proj"]
        self._gate_up = _linear(kernels, source, parts, 2 * inner, spec.hidden_size, spec.mlp_bias)
        self._down = _linear(kernels, source, [f"{name}.down_proj"], spec.hidden_size, inner, spec.mlp_bias)

    def __call__(self, x: Tensor) -> Tensor:
        parts = [self._down(self._kernels.gate(self._gate_up(part), self._activation)) for part in self._split(x)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _split(self, x: Tensor) -> list[Tensor]:
        """On CPU so few tokens at once that the wide intermediate stays near the core and is not allocated afresh."""
        size = _CPU_MLP_TOKENS if x.device.type == "cpu" else x.shape[0]
        return [x[first : first + size] for first in range(0, x.shape[0], size)] or [x]


class Layer:
    """Attention, then the MLP, each behind a norm and added to the residual stream: by the next norm, in one pass."""

    def __init__(self, spec: ModelSpec, layer: int, source: WeightSource, kernels: Kernels) -> None:
        self._kernels = kernels
        self._eps = spec.norm_eps
        norm = partial(_norm, spec, source, size=spec.hidden_size)
        name = f"model.layers.{layer}"
        self._attention_norm = norm(f"{name}.input_layernorm")
        self._attention = Attention(spec, layer, source, kernels)
        self._after_attention: Tensor | None = None
        self._after_mlp: Tensor | None = None
        if spec.has_post_norms:
            self._after_attention = norm(f"{name}.post_attention_layernorm")
            self._mlp_norm = norm(f"{name}.pre_feedforward_layernorm")
            self._after_mlp = norm(f"{name}.post_feedforward_layernorm")
        else:
            self._mlp_norm = norm(f"{name}.post_attention_layernorm")
        self._mlp = GatedMlp(spec, layer, source, kernels)

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        batch: Ragged,
        places: Places,
        kv: PagedKv,
        only: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the layer before adds to the ``residual`` stream (None: nothing was before), to the same of this layer.

        ``[tokens, hidden]``; with ``only``, all tokens' KV is written but just those rows go on.
        """
        add_norm = self._kernels.add_norm
        x, residual = add_norm(x, residual, self._attention_norm, self._eps)
        heads = self._attention(x, batch, places, kv)
        if only is not None:
            heads, residual = heads[only], residual[only]
        x = self._normed(self._attention.project(heads), self._after_attention)
        x, residual = add_norm(x, residual, self._mlp_norm, self._eps)
        return self._normed(self._mlp(x), self._after_mlp), residual

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else self._kernels.add_norm(x, None, weight, self._eps)[0]


class Decoder:
    """The model: from a step's tokens to logits, reading and writing KV memory. One thread at a time."""

    def __init__(self, spec: ModelSpec, source: WeightSource, kernels: Kernels, device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self.kernels = kernels
        one_by_one = kernels.is_batch_invariant and device.type == "cpu"
        self._rope = Rope(spec.rope, spec.head_dim, device, one_by_one=one_by_one)
        table = (spec.vocab_size, spec.hidden_size)
        self._embedding: Linear
        self._head: Product
        if spec.tie_embeddings:
            self._embedding = kernels.linear(source.parts(["model.embed_tokens.weight"], table), None)
            self._head = self._embedding
        else:
            self._head = _linear(kernels, source, ["lm_head"], *table, bias=False)
            self._embedding = DenseLinear(source.take(["model.embed_tokens.weight"], table), None)
        self._layers = [Layer(spec, layer, source, kernels) for layer in range(spec.num_layers)]
        self._norm = _norm(spec, source, "model.norm", spec.hidden_size)
        # Rounded as the embeddings are, which were trained with it so.
        self._embedding_scale = float(torch.tensor(spec.embedding_scale, dtype=source.dtype))

    @torch.inference_mode()
    def forward(self, step: StepInputs, kv: PagedKv, out: Tensor | None = None) -> Tensor:
        """float32 logits ``[len(step.logit_rows), vocab_size]``, in ``out`` if given. Writes all tokens' KV."""
        places = Places(*self._rope.angles(step.positions), step.blocks, step.offsets)
        x, residual = self._embedding.rows(step.tokens), None
        if self._embedding_scale != 1.0:
            x = x * self._embedding_scale
        for layer in self._layers[:-1]:
            x, residual = layer(x, residual, step.batch, places, kv)
        x, residual = self._layers[-1](x, residual, step.batch, places, kv, only=step.logit_rows)
        x, _ = self.kernels.add_norm(x, residual, self._norm, self.spec.norm_eps)
        logits = self._head(x)
        if (cap := self.spec.logit_soft_cap) is not None:
            logits = cap * torch.tanh(logits.float() / cap)
        return logits.float() if out is None else out.copy_(logits)


def _norm(spec: ModelSpec, source: WeightSource, name: str, size: int) -> Tensor:
    """A norm's weights. A sum with an offset stays in float32: it would lose what was added."""
    weight = source.take([f"{name}.weight"], (size,))
    return weight.float() + spec.norm_offset if spec.norm_offset else weight


def _linear(kernels: Kernels, source: WeightSource, names: list[str], rows: int, columns: int, bias: bool) -> Product:
    """The map of ``names``, one below the other. Where kernels take no quantised weights, it is one of plain ones, in
    the memory of plain ones."""
    matrices = source.matrices(names, (rows, columns))
    offset = source.take([f"{name}.bias" for name in names], (rows,)) if bias else None
    if kernels.quantised is not None and not all(isinstance(matrix, Tensor) for matrix in matrices):
        return kernels.quantised(matrices, offset)
    return kernels.linear([dequantise(matrix, source.dtype) for matrix in matrices], offset)
