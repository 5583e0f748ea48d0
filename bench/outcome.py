"""What became of one request, read from the stream's lines as they come. Sans I/O.

All times are seconds on one clock, read when bytes arrived and before they are parsed. A *piece* is an event that
shows something: text, reasoning, or token ids. Events without any (a role, a token that is not yet a character, usage)
are not pieces, whichever server sends them, so servers that announce more are not measured as faster.

TTFT   time to first token: from just before the request is sent to its first piece.
E2EL   end-to-end latency: from there to the last event of the choice, which is its last piece or its finish reason.
TPOT   time per output token after the first: (E2EL - TTFT) / (output tokens - 1). Undefined for one token.
ITL    inter-token latency: the gaps between pieces. Where a piece holds several tokens, there are fewer gaps than
       tokens, and ITL is not TPOT. (``--extra-body '{"return_token_ids": true}'`` makes every token a piece, where the
       server knows it.)

Tokens are those that the server's ``usage`` counts. A server that sends none is counted by token ids, or by pieces, and
the report says so. A stream that ends without a finish reason, reports an error, or has no token is a failure; failures
are counted and shown, and have no part in any average.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from router.values import Json

_LONGEST_MESSAGE = 300


@dataclass(frozen=True, slots=True)
class Answer:
    """A request that succeeded. ``piece_s`` are times since ``sent_s``, and there is at least one."""

    sent_s: float
    e2el_s: float
    piece_s: tuple[float, ...]
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None = None
    """Of the prompt, as the server says; None where it does not."""
    wanted_tokens: int | None = None
    finish_reason: str = "length"
    is_counted_by_server: bool = True

    @property
    def ttft_s(self) -> float:
        return self.piece_s[0]

    @property
    def tpot_s(self) -> float | None:
        if self.output_tokens < 2:
            return None
        return (self.e2el_s - self.ttft_s) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> tuple[float, ...]:
        return tuple(later - earlier for earlier, later in pairwise(self.piece_s))


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that did not. ``e2el_s`` is the time until that was known."""

    sent_s: float
    e2el_s: float
    message: str


Outcome = Answer | Failure


class Transcript:
    """Takes the lines of one event stream; ``outcome`` judges what they said."""

    def __init__(self, sent_s: float) -> None:
        self._sent_s = sent_s
        self._pieces: list[float] = []
        self._num_ids = 0
        self._last_s = sent_s
        self._finish: str | None = None
        self._usage: Mapping[str, Json] = {}
        self._error: str | None = None

    def line(self, line: str, at: float) -> None:
        """Takes one line, read at ``at``. Raises ValueError where its data is not a JSON object."""
        if not line.startswith("data:"):
            return
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event: Json = json.loads(data)
        if not isinstance(event, dict):
            raise ValueError(f"an event is not an object: {data[:80]}")
        if event.get("error") is not None:
            self._error = self._error or error_message(event, "the stream reports an error")
        if isinstance(usage := event.get("usage"), dict):
            self._usage = usage
        choices = event.get("choices")
        if isinstance(choices, list) and choices and isinstance(choice := choices[0], dict):
            self._choice(choice, at)

    def _choice(self, choice: Mapping[str, Json], at: float) -> None:
        ids = choice.get("token_ids")
        num_ids = len(ids) if isinstance(ids, list) else 0
        finish = choice.get("finish_reason")
        if num_ids or _shows_text(choice):
            self._pieces.append(at)
            self._num_ids += num_ids
        elif not isinstance(finish, str):
            return
        self._last_s = at
        if isinstance(finish, str):
            self._finish = finish

    def outcome(self, now: float, *, prompt_len: int | None = None, wanted_tokens: int | None = None) -> Outcome:
        """The verdict once the stream has ended. ``prompt_len`` counts where the server does not."""
        if self._error is not None:
            return self.failed(now, self._error)
        if self._finish is None:
            return self.failed(now, "the stream ended without a finish reason")
        counted = _whole(self._usage, "completion_tokens")
        output_tokens = self._num_ids or len(self._pieces) if counted is None else counted
        if output_tokens == 0:
            return self.failed(now, "the answer has no token")
        # An answer that never showed anything was first seen when it ended.
        pieces = self._pieces or [self._last_s]
        details = self._usage.get("prompt_tokens_details")
        prompt_tokens = _whole(self._usage, "prompt_tokens")
        return Answer(
            sent_s=self._sent_s,
            e2el_s=self._last_s - self._sent_s,
            piece_s=tuple(at - self._sent_s for at in pieces),
            prompt_tokens=(prompt_len or 0) if prompt_tokens is None else prompt_tokens,
            output_tokens=output_tokens,
            cached_tokens=_whole(details, "cached_tokens") if isinstance(details, dict) else None,
            wanted_tokens=wanted_tokens,
            finish_reason=self._finish,
            is_counted_by_server=counted is not None,
        )

    def failed(self, now: float, message: str) -> Failure:
        return Failure(self._sent_s, now - self._sent_s, message[:_LONGEST_MESSAGE])


def error_message(body: Mapping[str, Json], otherwise: str) -> str:
    """The message in OpenAI's error object, or in the flat ones that some servers send."""
    error = body.get("error", body)
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail")
    return error if isinstance(error, str) and error else otherwise


def _shows_text(choice: Mapping[str, Json]) -> bool:
    shown = choice.get("delta")
    parts = shown if isinstance(shown, dict) else choice
    return any(parts.get(name) for name in ("text", "content", "reasoning_content", "reasoning"))


def _whole(usage: Mapping[str, Json], name: str) -> int | None:
    value = usage.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
