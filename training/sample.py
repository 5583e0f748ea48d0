"""What a skill makes: a conversation whose assistant turns are to be learnt, and the split into training and held out.

The split is by content: a fingerprint of what makes an instance this instance decides, so that no luck of the draw can
bring a held-out instance into training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol, TypeVar

from router.values import JsonObject

HELD_OUT_IN = 10
"""One instance in so many is held out."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sample:
    """``messages`` end with the assistant's answer. ``tools`` are offered as in OpenAI's API.

    ``stretches``: the answer depends on something far back, so training may widen the distances. ``also``: other
    answers that are as right.
    """

    messages: tuple[JsonObject, ...]
    tools: tuple[JsonObject, ...] = ()
    stretches: bool = False
    also: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        return str(self.messages[-1]["content"])

    def accepts(self, said: str) -> bool:
        return said == self.answer or said in self.also


class Skill(Protocol):
    """``make`` gives an instance of the wanted side; a skill that is learnt by heart has one side only."""

    name: str

    def make(self, random: Random, *, held_out: bool) -> Sample: ...


def is_held_out(*content: object) -> bool:
    """Whether the instance with this content is kept from training; the same on every machine."""
    text = "\x1f".join(str(part) for part in content)
    return hashlib.blake2b(text.encode(), digest_size=4).digest()[0] % HELD_OUT_IN == 0


def draw(make: Callable[[], T], *, held_out: bool) -> T:
    """The first of ``make()`` on the wanted side. str() of what it makes must tell instances apart."""
    while True:
        made = make()
        if is_held_out(made) == held_out:
            return made


def user(text: str) -> JsonObject:
    return {"role": "user", "content": text}


def assistant(text: str) -> JsonObject:
    return {"role": "assistant", "content": text}


def asked(question: str, answer: str, *, stretches: bool = False) -> Sample:
    """One question, one answer."""
    return Sample((user(question), assistant(answer)), stretches=stretches)
