"""Logits to tokens: a pure function of (logits, parameters, seed, position).

Order of work, as in vLLM: log probabilities of the raw logits; allowed and suppressed tokens; logit bias; repetition,
frequency and presence penalties; then a kernel's ``draw``: the most likely token, or temperature, min_p, top_k, top_p
and noise. This is the sampler of the CPU, row after row, and the oracle of ``engine.device_sampler``.

Every operation works row by row, so a row's result does not depend on which rows share the batch. Float32 throughout.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import Sampled, SampleSpec
from kernels import noise, reference
from kernels.types import DrawRules
from proto.request import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to draw: ``spec`` for row ``row`` of the logits. ``follows``: as ``Row.follows``."""

    row: int
    spec: SampleSpec
    follows: int | None = None


def rules_of(specs: Sequence[SampleSpec]) -> DrawRules:
    """The part of ``specs`` that a kernel's ``draw`` is asked to do."""
    params = [spec.params for spec in specs]
    return DrawRules(
        temperature=[0.0 if p.is_greedy else p.temperature for p in params],
        min_p=[p.min_p for p in params],
        top_k=[p.top_k for p in params],
        top_p=[p.top_p for p in params],
        keys=[0 if p.is_greedy else noise.draw_key(s.seed, s.position) for s, p in zip(specs, params, strict=True)],
    )


@torch.inference_mode()
def sample(
    logits: Tensor, draws: Sequence[Draw], draw: Callable[[Tensor, DrawRules], Tensor] = reference.draw
) -> list[Sampled]:
    """One ``Sampled`` per draw. ``logits`` is float32 ``[rows, vocab_size]`` and is not changed."""
    if not draws:
        return []
    specs = [drawn.spec for drawn in draws]
    scores = logits[torch.tensor([drawn.row for drawn in draws], device=logits.device)]
    for row, spec in zip(scores, specs, strict=True):
        _restrict(row, spec)
        _penalise(row, spec)
    tokens: list[int] = draw(scores, rules_of(specs)).tolist()
    return [
        Sampled(token, _logprobs(logits[drawn.row], token, drawn.spec.params.logprobs))
        for drawn, token in zip(draws, tokens, strict=True)
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
