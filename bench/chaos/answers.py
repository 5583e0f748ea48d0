"""What a server answered, and how it compares with what it should have. Pure."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise, zip_longest

from bench.chaos.questions import Ask
from bench.outcome import error_message
from router.values import Json


@dataclass(frozen=True, slots=True)
class Said:
    """One choice."""

    tokens: tuple[int, ...]
    text: str
    finish: str | None


@dataclass(frozen=True, slots=True)
class Answer:
    """``error`` is None for a complete answer. ``token_s``: when tokens arrived, of a stream with one choice."""

    ask: Ask
    sent_s: float
    ended_s: float
    choices: tuple[Said, ...] = ()
    token_s: tuple[float, ...] = ()
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        return self.token_s[0] - self.sent_s if self.token_s else None

    @property
    def itl_s(self) -> tuple[float, ...]:
        return tuple(later - earlier for earlier, later in pairwise(self.token_s))


class Verdict(enum.Enum):
    RIGHT = "right"
    WRONG = "wrong"
    LOST = "lost"


def judge(answer: Answer, reference: Answer) -> tuple[Verdict, str]:
    """The verdict, and for a bad one what is bad about it."""
    if answer.error is not None:
        return Verdict.LOST, answer.error
    for index, (got, wanted) in enumerate(zip_longest(answer.choices, reference.choices)):
        if got is None or wanted is None:
            return Verdict.WRONG, f"{len(answer.choices)} choices instead of {len(reference.choices)}"
        if got != wanted:
            return Verdict.WRONG, f"choice {index}: {_difference(got, wanted)}"
    return Verdict.RIGHT, ""


def _difference(got: Said, wanted: Said) -> str:
    for position, (mine, yours) in enumerate(zip_longest(got.tokens, wanted.tokens)):
        if mine != yours:
            lengths = f"{len(got.tokens)} tokens instead of {len(wanted.tokens)}"
            return f"token {position} is {mine} instead of {yours}; {lengths}, {got.finish} instead of {wanted.finish}"
    return f"the same tokens, but {got.text!r} ({got.finish}) instead of {wanted.text!r} ({wanted.finish})"


class Transcript:
    """Collects a stream's events, or one whole reply. Raises ValueError where they are not what OpenAI's API says."""

    def __init__(self, ask: Ask, sent_s: float) -> None:
        self._ask = ask
        self._sent_s = sent_s
        self._tokens: dict[int, list[int]] = {}
        self._texts: dict[int, str] = {}
        self._finishes: dict[int, str] = {}
        self._token_s: list[float] = []
        self._error: str | None = None

    def line(self, line: str, at: float) -> None:
        """One line of an event stream."""
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            self.body(json.loads(data), at)

    def body(self, event: Json, at: float) -> None:
        """One event, or a whole reply."""
        if not isinstance(event, dict):
            raise ValueError("not an object")
        if event.get("error") is not None:
            self._error = self._error or error_message(event, "an error without a message")
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                self._choice(choice, at)

    def _choice(self, choice: Mapping[str, Json], at: float) -> None:
        index, tokens, text, finish = (choice.get(name) for name in ("index", "token_ids", "text", "finish_reason"))
        if not isinstance(index, int):
            raise ValueError("a choice without an index")
        if isinstance(tokens, list):
            ids = [token for token in tokens if isinstance(token, int)]
            self._tokens.setdefault(index, []).extend(ids)
            if self._ask.stream and ids and self._ask.question.params.get("n", 1) == 1:
                self._token_s.append(at)
        self._texts[index] = self._texts.get(index, "") + (text if isinstance(text, str) else "")
        if isinstance(finish, str):
            if index in self._finishes:
                self._error = self._error or f"choice {index} ended twice"
            self._finishes[index] = finish

    def failed(self, error: str, at: float) -> Answer:
        return Answer(self._ask, self._sent_s, at, self._choices(), tuple(self._token_s), error)

    def answer(self, at: float) -> Answer:
        """The answer, once the reply has ended."""
        wanted = self._ask.question.params.get("n", 1)
        if self._error is None and len(self._finishes) != wanted:
            self._error = f"only {len(self._finishes)} of {wanted} choices came to an end"
        return Answer(self._ask, self._sent_s, at, self._choices(), tuple(self._token_s), self._error)

    def _choices(self) -> tuple[Said, ...]:
        return tuple(
            Said(tuple(self._tokens.get(index, ())), self._texts[index], self._finishes.get(index))
            for index in sorted(self._texts)
        )
