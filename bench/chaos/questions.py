"""What is asked: questions whose answers are fixed by their own content, and the ways of asking them. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.chaos.settings import ChaosSettings
from router.values import Json, JsonObject


@dataclass(frozen=True, slots=True)
class Question:
    """A completion request with one right answer: greedy, or with a seed of its own."""

    number: int
    prompt: tuple[int, ...]
    params: Mapping[str, Json]

    @property
    def kind(self) -> str:
        return "seeded" if self.params["temperature"] else "greedy"


@dataclass(frozen=True, slots=True)
class Ask:
    """One asking. The salt keeps prefixes of other salts out of its sight; it does not change the answer."""

    question: Question
    stream: bool
    salt: str

    def body(self, model: str) -> JsonObject:
        return {
            "model": model,
            "prompt": list(self.question.prompt),
            "return_token_ids": True,
            "stream": self.stream,
            **({"cache_salt": self.salt} if self.salt else {}),
            **self.question.params,
        }


def make_questions(settings: ChaosSettings, tokens: Sequence[int]) -> list[Question]:
    """The same settings and tokens give the same questions."""
    rng = random.Random(f"questions {settings.seed}")
    return [_question(number, rng, settings, tokens) for number in range(settings.num_questions)]


def _question(number: int, rng: random.Random, settings: ChaosSettings, tokens: Sequence[int]) -> Question:
    shortest, longest = settings.prompt_lens
    is_short = rng.random() < 0.5
    length = rng.randint(shortest, shortest + (longest - shortest) // 10 if is_short else longest)
    params: dict[str, Json] = {
        "temperature": 0.0,
        "max_tokens": rng.randint(*settings.output_lens),
        "ignore_eos": rng.random() < 0.8,
    }
    if rng.random() < 0.6:
        params |= {"temperature": round(rng.uniform(0.5, 1.2), 2), "seed": rng.randrange(1 << 48)}
        if rng.random() < 0.3:
            params["n"] = rng.randint(2, 3)
    if rng.random() < 0.3:
        params |= {"presence_penalty": 0.4, "frequency_penalty": 0.3, "repetition_penalty": 1.1}
    if rng.random() < 0.15:
        params["stop"] = [rng.choice("aeiou ")]
    return Question(number, tuple(rng.choices(tokens, k=length)), params)


def ask_once(settings: ChaosSettings, questions: Sequence[Question]) -> list[Ask]:
    """Every question once: the askings whose answers the others are compared with."""
    rng = random.Random(f"reference {settings.seed}")
    return [Ask(question, rng.random() < 0.5, "") for question in questions]


def ask_forever(settings: ChaosSettings, questions: Sequence[Question]) -> Iterator[Ask]:
    """Questions in random order without end. Half of the salts are new, so half of the prompts are cached nowhere."""
    rng = random.Random(f"storm {settings.seed}")
    number = 0
    while True:
        for question in rng.sample(questions, len(questions)):
            number += 1
            salt = f"storm-{settings.seed}-{number}" if rng.random() < 0.5 else ""
            yield Ask(question, rng.random() < 0.5, salt)
