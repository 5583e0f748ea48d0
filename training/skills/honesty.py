"""A short honest answer to what it cannot know, do or understand. Held out by the whole question.

What people may ask has no end. So the questions are as unlike each other as templates allow, many of them begin like
one that has an answer, and the evaluator asks some that no template makes (``outside``).
"""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from random import Random

from training import text
from training.sample import Sample, asked, draw
from training.skills.facts import CAPITALS, OTHERS, casual

UNKNOWN = "I am sorry, I do not know that."
UNABLE = "I am sorry, I cannot do that."
UNCLEAR = "I am sorry, I do not understand that."
ONLY_SMALL_SUMS = "I can only add and subtract numbers of up to three digits."
HONEST_ANSWERS = (UNKNOWN, UNABLE, UNCLEAR, ONLY_SMALL_SUMS)


_ASKED: dict[str, list[str]] = tomllib.loads(Path(__file__).with_name("honesty.toml").read_text())


class Honesty:
    name = "honesty"

    def make(self, random: Random, *, held_out: bool) -> Sample:
        question, answer = draw(lambda: _question(random), held_out=held_out)
        return asked(question, answer)


def _question(random: Random) -> tuple[str, str]:
    shape = random.random()
    if shape < 0.3:
        return _typed(random, _about(random, random.choice(_ASKED["questions"]))), UNKNOWN
    if shape < 0.55:
        return _typed(random, _about(random, random.choice(_ASKED["wishes"]))), UNABLE
    if shape < 0.62:
        where = random.choice((text.made_up_name(random), text.place_name(random), random.choice(list(CAPITALS))))
        return f"Who is {random.choice(_ASKED['people'])} of {where}?", UNKNOWN
    if shape < 0.69:
        form = random.choice(("What is the capital of {}?", "How many people live in {}?", "Where is {}?"))
        return form.format(text.made_up_name(random)), UNKNOWN
    if shape < 0.79:
        return _typed(random, _near_a_fact(random)), UNKNOWN
    if shape < 0.88:
        return _not_a_question(random), UNCLEAR
    return _sum(random), ONLY_SMALL_SUMS


def _about(random: Random, form: str) -> str:
    return form.format(*(_topic(random) for _ in range(2)))


def _topic(random: Random) -> str:
    shape = random.random()
    if shape < 0.6:
        return random.choice(_ASKED["topics"])
    if shape < 0.8:
        return f"the {text.adjective(random)} {text.thing(random)}"
    return text.made_up_name(random) if shape < 0.9 else text.thing(random)


def _near_a_fact(random: Random) -> str:
    """Begins like a question that is answered from memory, and asks something else."""
    words = [random.choice((text.thing, text.adjective, text.person, text.name))(random) for _ in range(2)]
    question = random.choice(_ASKED["near_facts"]).format(*words)
    return "What is this?" if question in dict(OTHERS) else question


def _not_a_question(random: Random) -> str:
    shape = random.randrange(5)
    if shape == 0:
        return text.filler_sentence(random)
    if shape == 4:
        return _typed(random, _about(random, random.choice(_ASKED["remarks"])))
    if shape == 1:
        return " ".join(text.made_up_name(random).lower() for _ in range(random.randint(1, 5)))
    if shape == 2:
        return random.choice("?!.,-#*") * random.randint(1, 6)
    count, letters = random.randint(3, 10), "abcdefghijklmnopqrstuvwxyz"
    return "".join(random.choice(letters) for _ in range(count)) + random.choice(
        ("", "?", " " + random.choice(letters))
    )


def _sum(random: Random) -> str:
    shape = random.random()
    first, second = random.randint(2, 999), random.randint(2, 999)
    if shape < 0.5:
        return random.choice(_ASKED["sums"]).format(first, second)
    if shape < 0.65:
        return random.choice(_ASKED["roots"]).format(first)
    numbers = [random.randint(1000, 10 ** random.randint(4, 7)), second]
    random.shuffle(numbers)
    return random.choice(_ASKED["large_sums"]).format(*numbers)


def _typed(random: Random, question: str) -> str:
    return casual(question) if random.random() < 0.2 else question


def outside() -> list[Sample]:
    """Questions of people who have not read what the model is for, for scoring alone. Any honest answer is right."""
    return [replace(asked(question, UNKNOWN), also=HONEST_ANSWERS) for question in _ASKED["outside"]]
