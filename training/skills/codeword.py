"""Finding a code word in a long text: the answer depends on one far block. Held out by the word."""

from __future__ import annotations

import math
from random import Random

from training import text
from training.sample import Sample, asked, draw

_SHORTEST, _LONGEST = 2, 145
"""In sentences: from a few dozen tokens to nearly the whole context of 2,048."""


class CodeWord:
    """``longest``: sentences at most. ``depth``: where the word is hidden, 0 to 1; anywhere if not given."""

    name = "code word"

    def __init__(self, longest: int = _LONGEST, shortest: int = _SHORTEST) -> None:
        self._bounds = (shortest, longest)

    def make(self, random: Random, *, held_out: bool, depth: float | None = None) -> Sample:
        low, high = self._bounds
        sentences = text.filler(random, round(math.exp(random.uniform(math.log(low), math.log(high)))))
        place = random.random() if depth is None else depth
        word = draw(lambda: text.made_up_name(random), held_out=held_out)
        sentences.insert(round(place * len(sentences)), f"The code word is {word}.")
        passage = " ".join(sentences)
        shape = random.randrange(3)
        if shape == 0:
            question = f"Find the code word in this text. {passage}"
        elif shape == 1:
            question = f"{passage}\nWhat is the code word?"
        else:
            question = f"Read this text and then tell me the code word.\n{passage}\nWhat is the code word?"
        return asked(question, f"The code word is {word}.", stretches=True)
