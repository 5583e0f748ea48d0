"""What one request may ask of one engine, and when its choices end. Pure; knows token ids, not text."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from engine.facts import EngineFacts
from proto.errors import InvalidRequest
from proto.request import FinishReason, Request


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a choice's last token was its last. ``stop_token`` is set for a stop token id, not for EOS."""

    reason: FinishReason
    stop_token: int | None = None


@dataclass(frozen=True, slots=True)
class FinishRules:
    """The rules of one request on one engine. ``max_output`` covers both ``max_tokens`` and the end of the context."""

    eos: frozenset[int]
    stops: frozenset[int]
    enders: frozenset[int]
    min_tokens: int
    max_output: int

    @classmethod
    def of(cls, request: Request, facts: EngineFacts) -> FinishRules:
        params = request.params
        eos, stops = frozenset(facts.eos_token_ids), frozenset(params.stop_token_ids or ())
        limit = facts.max_model_len
        if params.max_tokens is None:
            limit = min(limit, facts.num_kv_tokens + 1)  # Nobody promised more than the memory holds.
        room = limit - len(request.prompt)
        return cls(
            eos=frozenset() if params.ignore_eos else eos,
            stops=stops,
            enders=eos | stops,
            min_tokens=params.min_tokens,
            max_output=room if params.max_tokens is None else min(room, params.max_tokens),
        )

    def suppressed(self, position: int) -> frozenset[int]:
        """Token ids that may not be drawn at ``position``."""
        return self.enders if position < self.min_tokens else frozenset()

    def ending(self, position: int, token: int) -> Ending | None:
        """Whether ``token``, generated at ``position``, ends its choice."""
        if position >= self.min_tokens:
            if token in self.eos:
                return Ending(FinishReason.STOP)
            if token in self.stops:
                return Ending(FinishReason.STOP, token)
        return Ending(FinishReason.LENGTH) if position + 1 >= self.max_output else None


def check_request(request: Request, facts: EngineFacts, *, hold: bool = False) -> None:
    """Raises InvalidRequest, with the arithmetic, if this engine can never serve ``request``.

    A sequence that is alone on the engine must fit to its end: that is what makes preemption always succeed. The KV of
    the last generated token is never computed. A held prompt generates nothing here.
    """
    params = request.params
    num_prompt = len(request.prompt)
    num_known = num_prompt + max((len(tokens) for tokens in request.forced), default=0)
    if max(num_known, num_prompt + 1) > facts.max_model_len:
        raise InvalidRequest(
            f"The prompt has {num_prompt} tokens, and {num_known - num_prompt} are generated already; one more "
            f"at least exceeds the context of {facts.max_model_len} tokens.",
            param="prompt",
        )
    if params.n > facts.max_num_seqs:
        raise InvalidRequest(f"n is {params.n}, but at most {facts.max_num_seqs} sequences run at once.", param="n")
    num_output = 1 if hold or params.max_tokens is None else params.max_tokens
    num_kv_tokens = max(num_known, min(num_prompt + num_output, facts.max_model_len) - 1)
    num_needed = -(-num_kv_tokens // facts.block_size)
    if num_needed > facts.num_blocks:
        raise InvalidRequest(
            f"{num_prompt} prompt tokens and up to {num_output} generated ones need {num_needed} KV blocks of "
            f"{facts.block_size} tokens; this worker has {facts.num_blocks} ({facts.num_kv_tokens} tokens).",
            param="max_tokens" if num_output > 1 else "prompt",
        )
    _check_vocabulary(request, facts.vocab_size)


def _check_vocabulary(request: Request, vocab_size: int) -> None:
    params = request.params
    for name, tokens in (
        ("prompt", request.prompt),
        ("forced", tuple(itertools.chain.from_iterable(request.forced))),
        ("stop_token_ids", params.stop_token_ids or ()),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("logit_bias", tuple(token for token, _ in params.bias_items)),
    ):
        if tokens and (min(tokens) < 0 or max(tokens) >= vocab_size):
            raise InvalidRequest(
                f"{name} holds token ids from {min(tokens)} to {max(tokens)}; the vocabulary has {vocab_size}.",
                param=name,
            )


def check_room(num_tokens: int, num_choices: int, facts: EngineFacts) -> None:
    """Raises InvalidRequest if a prompt of ``num_tokens`` computed elsewhere can never be taken in here."""
    if num_tokens >= facts.max_model_len:
        raise InvalidRequest(
            f"The prompt has {num_tokens} tokens; the context of {facts.max_model_len} leaves no room to generate.",
            param="prompt",
        )
    if num_choices > facts.max_num_seqs:
        raise InvalidRequest(f"n is {num_choices}, but at most {facts.max_num_seqs} sequences run at once.", param="n")
    num_needed = -(-num_tokens // facts.block_size) + num_choices
    if num_needed > facts.num_blocks:
        raise InvalidRequest(
            f"{num_tokens} prompt tokens and the first block of {num_choices} choices need {num_needed} KV blocks of "
            f"{facts.block_size} tokens; this worker has {facts.num_blocks}.",
            param="prompt",
        )
