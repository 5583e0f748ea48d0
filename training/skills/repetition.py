"""Saying again what was said. The plainest use of attention to what came before; other skills grow from it."""

from __future__ import annotations

from random import Random

from training import text
from training.sample import Sample, asked, draw


class Repetition:
    name = "repetition"

    def make(self, random: Random, *, held_out: bool) -> Sample:
        words = draw(lambda: _words(random), held_out=held_out)
        form = random.choice(("Repeat: {}", "Say this again: {}", "Repeat after me: {}"))
        return asked(form.format(words), words, stretches=True)


def _words(random: Random) -> str:
    if random.random() < 0.2:
        return text.filler_sentence(random)
    made = [
        str(random.randint(0, 999)) if random.random() < 0.2 else text.made_up_name(random)
        for _ in range(random.randint(1, 10))
    ]
    return " ".join(made)
