"""Logits to tokens: a pure function of (logits, parameters, seed, position).

Order of work, as in vLLM: log probabilities of the raw logits; allowed and suppressed tokens; logit bias; repetition,
frequency and presence penalties; then either the most likely token, or temperature, min_p, top_k, top_p and a draw.
A draw adds Gumbel noise (``kernels.noise``) and takes the largest: one pass, no running sums, the same on every device.

Every operation works row by row, so a row's result does not depend on which rows share the batch. Float32 throughout.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.batch import Sampled, SampleSpec
from kernels import noise
from proto.request import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to draw: ``spec`` for row ``row`` of the logits."""

    row: int
    spec: SampleSpec


Gumbel = Callable[[Sequence[int], int, torch.device], Tensor]
"""As ``kernels.noise.gumbel``."""


@torch.inference_mode()
def sample(logits: Tensor, draws: Sequence[Draw], gumbel: Gumbel = noise.gumbel) -> list[Sampled]:
    """One ``Sampled`` per draw. ``logits`` is float32 ``[rows, vocab_size]`` and is not changed."""
    if not draws:
        return []
    specs = [draw.spec for draw in draws]
    scores = logits[torch.tensor([draw.row for draw in draws], device=logits.device)]
    for row, spec in zip(scores, specs, strict=True):
        _restrict(row, spec)
        _penalise(row, spec)
    random = [index for index, spec in enumerate(specs) if not spec.params.is_greedy]
    if len(random) == len(specs):
        scores = _perturb(scores, specs, gumbel)
    elif random:
        chosen = torch.tensor(random, device=logits.device)
        scores[chosen] = _perturb(scores[chosen], [specs[index] for index in random], gumbel)
    tokens: list[int] = scores.argmax(-1).tolist()
    return [
        Sampled(token, _logprobs(logits[draw.row], token, draw.spec.params.logprobs))
        for draw, token in zip(draws, tokens, strict=True)
    ]


def _restrict(scores: Tensor, spec: SampleSpec) -> None:
    """Allowed, suppressed and biased token ids of one row ``[vocab_size]``, in place."""
    params = spec.params
    if params.allowed_token_ids is not None:
        allowed = _ids(params.allowed_token_ids, scores)
        kept = scores[allowed]
        scores.fill_(-math.inf)
        scores[allowed] = kept
    if spec.suppressed:
        scores[_ids(sorted(spec.suppressed), scores)] = -math.inf
    if params.logit_bias:
        items = [(token, bias) for token, bias in params.bias_items if token < scores.shape[0]]
        scores[_ids([token for token, _ in items], scores)] += torch.tensor(
            [bias for _, bias in items], dtype=scores.dtype, device=scores.device
        )


def _penalise(scores: Tensor, spec: SampleSpec) -> None:
    """Penalties of one row ``[vocab_size]``, in place: repetition over prompt and output, the others over output."""
    params = spec.params
    if params.repetition_penalty != 1.0:
        seen = _ids(sorted(set(spec.prompt).union(spec.output)), scores)
        values = scores[seen]
        penalty = params.repetition_penalty
        scores[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (params.frequency_penalty or params.presence_penalty) and spec.output:
        counts = sorted(Counter(spec.output).items())
        number = torch.tensor([count for _, count in counts], dtype=scores.dtype, device=scores.device)
        scores[_ids([token for token, _ in counts], scores)] -= (
            params.frequency_penalty * number + params.presence_penalty
        )


def _perturb(scores: Tensor, specs: Sequence[SampleSpec], gumbel: Gumbel) -> Tensor:
    """Scores whose argmax is a draw: ``[rows, vocab_size]``, cut off and with noise. Changes ``scores``."""
    params = [spec.params for spec in specs]
    scores /= _column([p.temperature for p in params], scores)
    cuts = [
        (_min_p_threshold, [index for index, p in enumerate(params) if p.min_p > 0]),
        (_top_k_threshold, [index for index, p in enumerate(params) if 0 < p.top_k < scores.shape[1]]),
        (_top_p_threshold, [index for index, p in enumerate(params) if p.top_p < 1]),
    ]
    for threshold, rows in cuts:
        if rows:
            chosen = torch.tensor(rows, device=scores.device)
            part = scores[chosen]
            scores[chosen] = part.masked_fill_(part < threshold(part, [params[row] for row in rows]), -math.inf)
    keys = [noise.draw_key(spec.seed, spec.position) for spec in specs]
    return scores.add_(gumbel(keys, scores.shape[1], scores.device))


# Tokens below a threshold [rows, 1] are cut off. Ties with it stay, so no sorting order decides.


def _min_p_threshold(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    return scores.amax(-1, keepdim=True) + _column([math.log(p.min_p) for p in params], scores)


def _top_k_threshold(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    largest = scores.topk(max(p.top_k for p in params)).values
    return largest.gather(1, torch.tensor([[p.top_k - 1] for p in params], device=scores.device))


def _top_p_threshold(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The fewest tokens that hold top_p of the probability that earlier cuts left."""
    ordered = _sort_descending(scores)
    mass = ordered.softmax(-1)
    before = mass.cumsum(-1) - mass
    kept = (before < _column([p.top_p for p in params], scores)).sum(-1, keepdim=True)
    return ordered.gather(1, (kept - 1).clamp_(min=0))


def _sort_descending(scores: Tensor) -> Tensor:
    """Values alone: on CPU numpy sorts them some twenty times as fast as torch, which keeps indices too."""
    if scores.device.type == "cpu":
        return torch.from_numpy(-np.sort(-scores.numpy(), axis=-1))
    return scores.sort(-1, descending=True).values


def _logprobs(logits: Tensor, token: int, num_top: int | None) -> TokenLogprobs | None:
    """Of raw ``logits [vocab_size]``. Equally likely tokens are listed by id."""
    if num_top is None:
        return None
    total = logits.logsumexp(0)
    own = logits[token]
    rank = int((logits > own).sum()) + 1
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        smallest = logits.topk(min(num_top, logits.shape[0])).values[-1]
        ids = (logits >= smallest).nonzero()[:, 0]
        pairs = zip(ids.tolist(), (logits[ids] - total).tolist(), strict=True)
        top = tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:num_top])
    return TokenLogprobs(float(own - total), rank, top)


def _ids(tokens: Sequence[int], like: Tensor) -> Tensor:
    """Token ids as an index; those beyond the vocabulary, which no logit stands for, are dropped."""
    return torch.tensor([token for token in tokens if token < like.shape[0]], dtype=torch.int64, device=like.device)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
