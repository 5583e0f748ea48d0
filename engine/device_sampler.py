"""``engine.sampler`` for a device that computes by itself: the same tokens, and no wait for any of them.

    logits ─▶ scores: allowed, suppressed, biased, penalised ─▶ a kernel's draw ─▶ tokens   all on the device
                                                                                    └─▶ the next step's input

What is asked of single rows is gathered into lists, one operation for all rows that ask for it; whoever asks for
nothing costs nothing. A draw may follow a token that is itself still being drawn: penalties count it on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.batch import Sampled
from engine.sampler import Draw, rules_of
from kernels.types import DrawRules
from kernels.upload import upload
from proto.request import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of the draws that ask for any, in their order: own log probability and rank, ``[n]``; the likeliest tokens, ids
    and log probabilities, ``[n, as many as anybody asks for]``."""

    own: Tensor
    rank: Tensor
    top_ids: Tensor
    top: Tensor

    def on_host(self) -> Logprobs:
        """As ``Drawn.on_host``."""
        tensors = (self.own, self.rank, self.top_ids, self.top)
        return Logprobs(*(tensor.to("cpu", non_blocking=True) for tensor in tensors))


@dataclass(frozen=True, slots=True)
class Drawn:
    """``tokens``: int64 ``[draws]``."""

    tokens: Tensor
    logprobs: Logprobs | None

    def on_host(self) -> Drawn:
        """The same in page-locked memory, filled when the device has done what is queued on it now."""
        logprobs = None if self.logprobs is None else self.logprobs.on_host()
        return Drawn(self.tokens.to("cpu", non_blocking=True), logprobs)

    def sampled(self, draws: Sequence[Draw]) -> list[Sampled]:
        """One per draw, of what is on the host and filled."""
        found = iter(() if self.logprobs is None else _listed(self.logprobs, _wishes(draws)))
        return [
            Sampled(token, None if draw.spec.params.logprobs is None else next(found))
            for token, draw in zip(self.tokens.tolist(), draws, strict=True)
        ]


@torch.inference_mode()
def sample_on_device(
    logits: Tensor,
    draws: Sequence[Draw],
    draw: Callable[[Tensor, DrawRules], Tensor],
    drawn: Tensor | None = None,
    *,
    is_batch_invariant: bool = False,
) -> Drawn:
    """Draws from float32 ``logits [rows, vocab_size]``, which are not changed. There is one draw at least.

    ``drawn``: the tokens of the step before, which draws may follow. ``is_batch_invariant``: log probabilities have the
    same bits beside any others; ``draw`` sees to the tokens.
    """
    rows = upload([each.row for each in draws], torch.int64, logits.device)
    scores = logits.index_select(0, rows)
    _restrict(scores, draws)
    _penalise(scores, draws, drawn)
    tokens = draw(scores, rules_of([each.spec for each in draws]))
    return Drawn(tokens, _logprobs(logits, rows, tokens, _wishes(draws), is_batch_invariant))


# -- what changes scores -----------------------------------------------------------------------------------------------


def _restrict(scores: Tensor, draws: Sequence[Draw]) -> None:
    """Allowed, suppressed and biased token ids, in place."""
    vocab_size, device, flat = scores.shape[1], scores.device, scores.view(-1)
    params = [each.spec.params for each in draws]
    picky = [place for place, p in enumerate(params) if p.allowed_token_ids is not None]
    if picky:
        allowed = upload(
            _places(((place, params[place].allowed_token_ids or ()) for place in picky), vocab_size),
            torch.int64,
            device,
        )
        kept = flat.index_select(0, allowed)
        scores.index_fill_(0, upload(picky, torch.int64, device), -math.inf)
        flat.index_copy_(0, allowed, kept)
    suppressed = [(place, tuple(each.spec.suppressed)) for place, each in enumerate(draws) if each.spec.suppressed]
    if suppressed:
        flat.index_fill_(0, upload(_places(suppressed, vocab_size), torch.int64, device), -math.inf)
    biased = [(place, token, bias) for place, p in enumerate(params) if p.logit_bias for token, bias in p.bias_items]
    biased = [each for each in biased if each[1] < vocab_size]
    if biased:
        at = upload([place * vocab_size + token for place, token, _ in biased], torch.int64, device)
        flat.index_add_(0, at, upload([bias for _, _, bias in biased], torch.float32, device))


def _penalise(scores: Tensor, draws: Sequence[Draw], drawn: Tensor | None) -> None:
    """Penalties in place: repetition over prompt and output, the others over output."""
    chosen = [place for place, each in enumerate(draws) if _is_penalised(each.spec.params)]
    if not chosen:
        return
    vocab_size, device = scores.shape[1], scores.device
    specs = [draws[place].spec for place in chosen]
    counts = torch.zeros((len(chosen), vocab_size), dtype=torch.float32, device=device)
    flat = counts.view(-1)
    output = upload(_places(((n, spec.output) for n, spec in enumerate(specs)), vocab_size), torch.int64, device)
    flat.index_add_(0, output, torch.ones(output.shape, device=device))
    following = [(n, draws[place].follows) for n, place in enumerate(chosen) if draws[place].follows is not None]
    if following:
        assert drawn is not None, "there was no step to follow"
        numbers, sources = upload(list(zip(*following, strict=True)), torch.int64, device)
        flat.index_add_(
            0, numbers * vocab_size + drawn.index_select(0, sources), torch.ones(numbers.shape, device=device)
        )
    seen = counts > 0
    prompts = ((n, spec.prompt) for n, spec in enumerate(specs) if spec.params.repetition_penalty != 1.0)
    seen.view(-1).index_fill_(0, upload(_places(prompts, vocab_size), torch.int64, device), True)

    def column(values: Sequence[float]) -> Tensor:
        return upload(values, torch.float32, device)[:, None]

    params = [spec.params for spec in specs]
    at = upload(chosen, torch.int64, device)
    values = scores.index_select(0, at)
    repetition = column([p.repetition_penalty for p in params])
    values = torch.where(seen, torch.where(values > 0, values / repetition, values * repetition), values)
    frequency, presence = column([p.frequency_penalty for p in params]), column([p.presence_penalty for p in params])
    scores.index_copy_(0, at, values - torch.where(counts > 0, frequency * counts + presence, 0.0))


def _is_penalised(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or bool(params.frequency_penalty or params.presence_penalty)


def _places(tokens: Iterable[tuple[int, Sequence[int]]], vocab_size: int) -> np.ndarray:
    """Where each row's tokens lie in ``[rows * vocab_size]``; ids beyond the vocabulary have no score."""
    found = [np.zeros(0, dtype=np.int64)]
    for row, ids in tokens:
        each = np.asarray(ids, dtype=np.int64)
        found.append(each[each < vocab_size] + row * vocab_size)
    return np.concatenate(found)


# -- log probabilities -------------------------------------------------------------------------------------------------


def _wishes(draws: Sequence[Draw]) -> list[tuple[int, int]]:
    """The draws whose log probabilities are wanted, and how many of the likeliest tokens'."""
    wanted = [(place, each.spec.params.logprobs) for place, each in enumerate(draws)]
    return [(place, num_top) for place, num_top in wanted if num_top is not None]


def _logprobs(
    logits: Tensor, rows: Tensor, tokens: Tensor, wishes: Sequence[tuple[int, int]], is_batch_invariant: bool
) -> Logprobs | None:
    """Of raw ``logits``. Equally likely tokens are listed by id."""
    if not wishes:
        return None
    vocab_size = logits.shape[1]
    asking = upload([place for place, _ in wishes], torch.int64, logits.device)
    raw = logits.index_select(0, rows.index_select(0, asking))
    if is_batch_invariant:  # how torch splits a row's sum depends on how many rows there are
        total = torch.stack([row.logsumexp(0, keepdim=True) for row in raw])
    else:
        total = raw.logsumexp(-1, keepdim=True)
    own = raw.gather(1, tokens.index_select(0, asking)[:, None])
    rank = (raw > own).sum(-1) + 1
    most = min(max(num_top for _, num_top in wishes), vocab_size)
    # The order of numbers and then of ids, as one integer; + 0.0 makes the two zeros one.
    bits = (raw + 0.0).view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64) << 32
    ids = torch.arange(vocab_size - 1, -1, -1, device=logits.device)
    top_ids = vocab_size - 1 - ((order + ids).topk(most, sorted=True).values & 0xFFFFFFFF)
    return Logprobs((own - total)[:, 0], rank, top_ids, raw.gather(1, top_ids) - total)


def _listed(found: Logprobs, wishes: Sequence[tuple[int, int]]) -> list[TokenLogprobs]:
    columns = (found.own.tolist(), found.rank.tolist(), found.top_ids.tolist(), found.top.tolist())
    return [
        TokenLogprobs(own, rank, tuple(zip(ids[:num_top], top[:num_top], strict=True)))
        for own, rank, ids, top, (_, num_top) in zip(*columns, wishes, strict=True)
    ]
