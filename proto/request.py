"""What a client asked for, in the form that travels, and what comes back token by token.

Knows tokens and numbers; knows nothing of text, templates, HTTP or tensors.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proto.errors import InvalidRequest
from proto.ids import RequestId

_MASK64 = (1 << 64) - 1
MAX_CHOICES = 128
_MAX_WHOLE = (1 << 63) - 1
"""Whole numbers without another bound still have to fit the wire."""


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


def derive_seed(seed: int, choice: int) -> int:
    """The seed of choice ``choice`` of a request seeded ``seed``: choice 0 keeps it, the others mix (splitmix64)."""
    if choice == 0:
        return seed & _MASK64
    z = (seed + choice * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a choice ends. Names, defaults and ranges are vLLM's.

    ``checked()`` returns the same parameters with every value validated and in its one normal form;
    everything that accepts parameters from outside calls it once.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: all tokens."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = None
    """Added to the logits; ``checked()`` turns it into a sorted tuple of (token id, bias in [-100, 100])."""
    seed: int | None = None
    """None or -1: a random one. The router draws it, so an accepted request always has one."""
    stop: str | Sequence[str] | None = None
    """Strings that end a choice. Matched on text, so by whoever detokenises (router or ``LLM``), not by the engine."""
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    """None: all the room the context leaves."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none. k: the chosen token's and the k most likely ones' log probabilities (0: the chosen one's alone)."""
    allowed_token_ids: Sequence[int] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def bias_items(self) -> tuple[tuple[int, float], ...]:
        bias = self.logit_bias or ()
        return tuple(sorted(bias.items())) if isinstance(bias, Mapping) else tuple(bias)

    def checked(self, *, max_logprobs: int = 20) -> SamplingParams:
        """These parameters, validated and normalised (tuples; no aliases). Raises InvalidRequest."""
        _whole("n", self.n, 1, MAX_CHOICES)
        _number("temperature", self.temperature, 0.0, 2.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p <= 0.0:
            raise InvalidRequest(f"top_p must be in (0, 1], got {self.top_p}.", param="top_p")
        _whole("top_k", self.top_k, -1, None)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, None)
        if self.repetition_penalty <= 0.0:
            raise InvalidRequest("repetition_penalty must be greater than 0.", param="repetition_penalty")
        if self.seed is not None:
            _whole("seed", self.seed, -(1 << 63), _MASK64)
        _whole("min_tokens", self.min_tokens, 0, None)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, None)
            if self.min_tokens > self.max_tokens:
                raise InvalidRequest(
                    f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens}).",
                    param="min_tokens",
                )
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, max_logprobs)
        if any(not text for text in self.stop_strings):
            raise InvalidRequest("stop strings must not be empty.", param="stop")
        if self.n > 1 and self.is_greedy:
            raise InvalidRequest("n must be 1 when temperature is 0: every choice would be the same.", param="n")
        for token, bias in self.bias_items:
            _whole("logit_bias", token, 0, None)
            _number("logit_bias", bias, -100.0, 100.0)
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("allowed_token_ids", self.allowed_token_ids)):
            for token in ids or ():
                _whole(name, token, 0, None)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequest("allowed_token_ids must not be empty.", param="allowed_token_ids")
        return dataclasses.replace(
            self,
            top_k=max(self.top_k, 0),
            logit_bias=self.bias_items or None,
            seed=None if self.seed is None or self.seed == -1 else self.seed & _MASK64,
            stop=self.stop_strings or None,
            stop_token_ids=tuple(self.stop_token_ids or ()) or None,
            allowed_token_ids=None if self.allowed_token_ids is None else tuple(sorted(set(self.allowed_token_ids))),
        )


def _whole(name: str, value: Any, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be a whole number, got {value!r}.", param=name)
    _in_range(name, value, low, high if high is not None else _MAX_WHOLE)


def _number(name: str, value: Any, low: float, high: float | None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
        raise InvalidRequest(f"{name} must be a finite number, got {value!r}.", param=name)
    _in_range(name, value, low, high)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _in_range(name: str, value: float, low: float, high: float | None) -> None:
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high in (None, _MAX_WHOLE) and value < low else f"between {low} and {high}"
        raise InvalidRequest(f"{name} must be {bounds}, got {value}.", param=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One accepted request as workers see it. ``params`` is checked and seeded."""

    id: RequestId
    prompt: tuple[int, ...]
    params: SamplingParams
    cache_salt: str = ""
    priority: int = 0
    """Lower runs first, as in vLLM."""
    forced: tuple[tuple[int, ...], ...] = ()
    """Per choice, tokens already generated elsewhere: they are part of the sequence and are not sampled again.

    Empty: a fresh request. Otherwise one entry per choice, each possibly empty.
    """

    def __post_init__(self) -> None:
        assert self.prompt, "an accepted request has at least one prompt token"
        assert self.params.seed is not None, "an accepted request has a seed"
        assert not self.forced or len(self.forced) == self.params.n

    @property
    def seed(self) -> int:
        assert self.params.seed is not None
        return self.params.seed

    @property
    def is_resumed(self) -> bool:
        return any(self.forced)

    @property
    def prefix(self) -> tuple[int, ...]:
        """The tokens that all its choices have in common, whose KV can change owner: the prompt, and behind it what a
        single choice has generated already."""
        return self.prompt + self.forced[0] if len(self.forced) == 1 else self.prompt

    @property
    def num_forced(self) -> tuple[int, ...]:
        """Per choice, the position of the next token to be sampled."""
        return tuple(len(tokens) for tokens in self.forced) or (0,) * self.params.n


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities of one position, from the raw logits (before penalties and temperature).

    ``top`` lists (token id, log probability), most likely first; ``rank`` is the chosen token's, from 1.
    """

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenOut:
    """One token of one choice. ``position`` counts generated tokens from 0 (forced ones included).

    A choice's last token carries ``finish``; ``stop_token`` is set when a stop token id (not EOS) ended it.
    """

    request: RequestId
    choice: int
    position: int
    token: int
    logprobs: TokenLogprobs | None = None
    finish: FinishReason | None = None
    stop_token: int | None = None
