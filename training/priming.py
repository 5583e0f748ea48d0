"""Gives a network heads that look one, two and three tokens back, which it would take long to find by itself.

Copying (names, numbers, code words) is looking for what followed the same token earlier; that needs to know, at every
token, which one came before. One hidden channel becomes a constant that nothing writes to: on it a head's query and key
can depend on positions alone, and their rotation makes the product greatest at the wanted distance.
"""

from __future__ import annotations

import torch

from training.model import Attention, Layer, Network

_CONSTANT = 4.0
"""The constant channel, in multiples of the other channels' root mean square."""

_PAIRS = 5
"""The fastest turning pairs of a head; slower ones can hardly tell neighbours apart."""

_SHARPNESS = 7.0
"""The attention logit that each pair adds at the wanted distance."""


@torch.no_grad()
def prime(network: Network) -> None:
    """Changes channel 0, and the first key head of the first layer with the query heads that share it."""
    embedding = network.embed_tokens.weight
    embedding[:, 0] = _CONSTANT * embedding[:, 1:].square().mean().sqrt()
    for layer in network.layers:
        assert isinstance(layer, Layer)
        attention, mlp = layer.self_attn, layer.mlp
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            reader.weight[:, 0] = 0.0
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight[0] = 0.0
    first = network.layers[0]
    assert isinstance(first, Layer)
    _look_back(first.self_attn)


def _look_back(attention: Attention) -> None:
    shape = attention.shape
    dim, half = shape.head_dim, shape.head_dim // 2
    rates = shape.rope_theta ** (-torch.arange(_PAIRS, dtype=torch.float32) / half)
    # With one channel that large, its normed value; a query and a key of this length give the wanted logit.
    normed = _CONSTANT / (1 + (_CONSTANT**2 - 1) / shape.hidden) ** 0.5
    length = (_SHARPNESS * dim**0.5) ** 0.5 / normed
    attention.k_proj.weight[:dim] = 0.0
    attention.k_proj.weight[:_PAIRS, 0] = length
    for head in range(shape.heads // shape.kv_heads):
        query = attention.q_proj.weight[head * dim : (head + 1) * dim]
        query.zero_()
        # Turned back by the wanted distance, so that it meets a key that many positions earlier in phase.
        angles = -rates * (head + 1)
        query[:_PAIRS, 0] = length * angles.cos()
        query[half : half + _PAIRS, 0] = length * angles.sin()
