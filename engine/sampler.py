"""Logits to tokens: a pure function of (logits, parameters, seed, position).

Order of work, as in vLLM: log probabilities of the raw logits; allowed and suppressed tokens; logit bias; repetition,
frequency and presence penalties; then either the most likely token, or temperature, min_p, top_k, top_p and a draw.
A draw adds Gumbel noise (``kernels.noise``) and takes the largest: one pass, no running sums, the same on every device.

Every operation works row by row, so a row's result does not depend on which rows share the batch. Float32 throughout.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

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


@torch.inference_mode()
def sample(logits: Tensor, draws: Sequence[Draw]) -> list[Sampled]:
    """One ``Sampled`` per draw. ``logits`` is float32 ``[rows, vocab_size]`` and is not changed."""
    if not draws:
        return []
    specs = [draw.spec for draw in draws]
    scores = logits[torch.tensor([draw.row for draw in draws], device=logits.device)]
    for row, spec in zip(scores, specs, strict=True):
        _restrict(row, spec)
        _penalise(row, spec)
    random = [index for index, spec in enumerate(specs) if not spec.params.is_greedy]
    if random:
        chosen = torch.tensor(random, device=logits.device)
        scores[chosen] = _perturb(scores[chosen], [specs[index] for index in random])
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


def _perturb(scores: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """Scores whose argmax is a draw: ``[rows, vocab_size]``, masked and with noise."""
    params = [spec.params for spec in specs]
    scores = scores / _column([p.temperature for p in params], scores)
    if any(p.min_p > 0 for p in params):
        floor = _column([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params], scores)
        scores.masked_fill_(scores < scores.amax(-1, keepdim=True) + floor, -math.inf)
    sorting = [index for index, p in enumerate(params) if _sorts(p, scores.shape[1])]
    if sorting:
        chosen = torch.tensor(sorting, device=scores.device)
        scores[chosen] = _truncate(scores[chosen], [params[index] for index in sorting])
    keys = [noise.draw_key(spec.seed, spec.position) for spec in specs]
    return scores + noise.gumbel(keys, scores.shape[1], scores.device)


def _sorts(params: SamplingParams, vocab_size: int) -> bool:
    return 0 < params.top_k < vocab_size or params.top_p < 1.0


def _truncate(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Keeps the top_k tokens and, of those, the fewest that hold top_p of the probability.

    Both cut at a value: tokens that tie with the last one kept are kept too, so no sorting order decides.
    """
    ordered = scores.sort(-1, descending=True).values
    vocab_size = scores.shape[1]
    last = torch.tensor([[(p.top_k or vocab_size) - 1] for p in params], device=scores.device).clamp_(
        max=vocab_size - 1
    )
    threshold = ordered.gather(1, last)
    if any(p.top_p < 1.0 for p in params):
        mass = ordered.masked_fill(ordered < threshold, -math.inf).softmax(-1)
        before = mass.cumsum(-1) - mass
        kept = (before < _column([p.top_p for p in params], scores)).sum(-1, keepdim=True)
        threshold = torch.maximum(threshold, ordered.gather(1, (kept - 1).clamp_(min=0)))
    return scores.masked_fill_(scores < threshold, -math.inf)


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
