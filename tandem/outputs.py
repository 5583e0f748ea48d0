"""What ``LLM`` returns, in the shape that vLLM's users know."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Logprob:
    """One candidate at one position. ``rank`` counts from 1, the most likely."""

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One choice. ``token_ids`` include the token that ended it, ``text`` does not (unless asked to).

    ``logprobs``: per token, candidates by token id; None unless asked for, as ``cumulative_logprob``. ``stop_reason``:
    the stop string or stop token id that ended it; None for the end-of-sequence token and for the length.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: str | int | None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One prompt and its choices. ``prompt`` is None where the prompt was given as token ids."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
