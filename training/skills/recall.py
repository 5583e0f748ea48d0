"""Remembering what was said turns ago, with other talk in between. Held out by what was said."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from router.values import JsonObject
from training import text
from training.sample import Sample, Skill, assistant, is_held_out, user

_NOTED = "I will remember that."
UNTOLD = "You have not told me that."


def _number(random: Random) -> str:
    return str(random.randint(100, 999))


# What is said; what is asked; the answer; what fills the gap.
_TOLD: tuple[tuple[str, str, str, Callable[[Random], str]], ...] = (
    ("My name is {}.", "What is my name?", "Your name is {}.", text.name),
    ("My dog is called {}.", "What is my dog called?", "Your dog is called {}.", text.made_up_name),
    ("My cat is called {}.", "What is my cat called?", "Your cat is called {}.", text.made_up_name),
    ("My sister is {}.", "Who is my sister?", "Your sister is {}.", text.name),
    ("I live in {}.", "Where do I live?", "You live in {}.", text.place_name),
    ("I was born in {}.", "Where was I born?", "You were born in {}.", text.place_name),
    ("I work for {}.", "Who do I work for?", "You work for {}.", text.made_up_name),
    ("My room number is {}.", "What is my room number?", "Your room number is {}.", _number),
    ("My locker code is {}.", "What is my locker code?", "Your locker code is {}.", _number),
)


class Recall:
    """``others`` make the talk in between; only short ones keep a conversation short."""

    name = "recall"

    def __init__(self, others: tuple[Skill, ...]) -> None:
        self._others = others

    def make(self, random: Random, *, held_out: bool) -> Sample:
        told = random.sample(_TOLD, random.choice((1, 2, 2, 3, 3)))
        values = [self._value(random, entry, held_out) for entry in told]
        messages: list[JsonObject] = []
        if random.random() < 0.3:
            messages += [user(" ".join(e[0].format(v) for e, v in zip(told, values, strict=True))), _noted(random)]
        else:
            for entry, value in zip(told, values, strict=True):
                messages += [user(entry[0].format(value)), _noted(random)]
        for _ in range(random.choice((0, 1, 1, 2, 3))):
            place = 2 * random.randint(1, len(messages) // 2)
            messages[place:place] = random.choice(self._others).make(random, held_out=held_out).messages
        untold = [entry for entry in _TOLD if entry not in told]
        if random.random() < 0.3:
            messages += [user(random.choice(untold)[1]), assistant(UNTOLD)]
        else:
            which = random.randrange(len(told))
            messages += [user(told[which][1]), assistant(told[which][2].format(values[which]))]
        return Sample(tuple(messages), stretches=True)

    def _value(self, random: Random, entry: tuple[str, str, str, Callable[[Random], str]], held_out: bool) -> str:
        while True:
            value = entry[3](random)
            if is_held_out(entry[0], value) == held_out:
                return value


def _noted(random: Random) -> JsonObject:
    return assistant(_NOTED)
