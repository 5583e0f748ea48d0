"""One token from each row of scores, in plain torch: the likeliest one, or a draw.

A draw divides by the temperature, cuts off tokens by min_p, then top_k, then top_p, adds Gumbel noise and takes the
largest: one pass, no running sums over what was drawn, the same on every device. Makes no host wait for a device.

Every operation works row by row, so a row's result does not depend on which rows share the batch. Float32 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from kernels import noise
from kernels.types import DrawRules
from kernels.upload import upload

Gumbel = Callable[[Sequence[int], int, torch.device], Tensor]
"""As ``kernels.noise.gumbel``."""


def draw(scores: Tensor, rules: DrawRules, gumbel: Gumbel = noise.gumbel) -> Tensor:
    """Token ids, int64 ``[rows]``, of float32 ``scores [rows, vocab_size]``, which may be changed.

    The first of equals wins; where all scores of a row are -inf, that is token 0.
    """
    random = rules.random_rows
    if len(random) == len(rules):
        scores = _perturb(scores, rules, gumbel)
    elif random:
        chosen = upload(random, torch.int64, scores.device)
        scores[chosen] = _perturb(scores[chosen], rules.of(random), gumbel)
    return scores.argmax(-1)


def _perturb(scores: Tensor, rules: DrawRules, gumbel: Gumbel) -> Tensor:
    """Scores whose argmax is a draw: ``[rows, vocab_size]``, cut off and with noise. Changes ``scores``."""
    scores /= _column(rules.temperature, scores)
    vocab_size = scores.shape[1]
    cuts = [
        (_min_p_threshold, [row for row, min_p in enumerate(rules.min_p) if min_p > 0]),
        (_top_k_threshold, [row for row, top_k in enumerate(rules.top_k) if 0 < top_k < vocab_size]),
        (_top_p_threshold, [row for row, top_p in enumerate(rules.top_p) if top_p < 1]),
    ]
    for threshold, rows in cuts:
        if rows:
            chosen = upload(rows, torch.int64, scores.device)
            part = scores[chosen]
            scores[chosen] = part.masked_fill_(part < threshold(part, rules.of(rows)), -math.inf)
    return scores.add_(gumbel(rules.keys, vocab_size, scores.device))


# Tokens below a threshold [rows, 1] are cut off. Ties with it stay, so no sorting order decides.


def _min_p_threshold(scores: Tensor, rules: DrawRules) -> Tensor:
    return scores.amax(-1, keepdim=True) + _column([math.log(min_p) for min_p in rules.min_p], scores)


def _top_k_threshold(scores: Tensor, rules: DrawRules) -> Tensor:
    largest = scores.topk(max(rules.top_k)).values
    return largest.gather(1, upload([[top_k - 1] for top_k in rules.top_k], torch.int64, scores.device))


def _top_p_threshold(scores: Tensor, rules: DrawRules) -> Tensor:
    """The fewest tokens that hold top_p of the probability that earlier cuts left."""
    ordered = _sort_descending(scores)
    mass = ordered.softmax(-1)
    before = mass.cumsum(-1) - mass
    kept = (before < _column(rules.top_p, scores)).sum(-1, keepdim=True)
    return ordered.gather(1, (kept - 1).clamp_(min=0))


def _sort_descending(scores: Tensor) -> Tensor:
    """Values alone: on CPU numpy sorts them some twenty times as fast as torch, which keeps indices too."""
    if scores.device.type == "cpu":
        return torch.from_numpy(-np.sort(-scores.numpy(), axis=-1))
    return scores.sort(-1, descending=True).values


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return upload(values, like.dtype, like.device)[:, None]
