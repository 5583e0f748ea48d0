"""A short honest answer to what it cannot know or do. Held out by the whole question."""

from __future__ import annotations

from random import Random

from training import text
from training.sample import Sample, asked, draw
from training.skills.facts import CAPITALS

UNKNOWN = "I am sorry, I do not know that."
UNABLE = "I am sorry, I cannot do that."
ONLY_SMALL_SUMS = "I can only add and subtract numbers of up to three digits."

_TOPICS = """the sea|love|the war|black holes|football|the French Revolution|photosynthesis|inflation|cats|dogs|jazz|
computers|quantum physics|evolution|the stock market|climate change|volcanoes|democracy|cooking|chess|the Roman Empire|
gravity|electricity|the internet|vaccines|dreams|music|winter|autumn|friendship|money|space travel|dinosaurs|bread|cars|
the heart|the brain|engines|poetry|history|philosophy|mathematics|robots|whales|trees|rivers|coffee|wine|tea""".replace(
    "\n", ""
).split("|")
_QUESTIONS = (
    "Explain {}.",
    "What do you think about {}?",
    "How does {} work?",
    "Why is {} important?",
    "What do you know about {}?",
    "Give me the history of {}.",
    "Who invented {}?",
    "When did {} begin?",
    "Is {} good or bad?",
    "Where does {} come from?",
    "Can you explain {} to me?",
    "What is the meaning of {}?",
    "How much does {} cost?",
)
_PEOPLE = ("the president", "the king", "the prime minister", "the best player", "the richest person", "the mayor")
_WISHES = (
    "Write a poem about {}.",
    "Write a story about {}.",
    "Tell me a joke about {}.",
    "Write an essay about {}.",
    "Write a song about {}.",
    "Draw a picture of {}.",
    "Translate {} into French.",
    "Write a Python program about {}.",
    "Write code for {}.",
    "Make a plan for {}.",
    "Summarize a book about {}.",
    "Give me a recipe with {}.",
)


class Honesty:
    name = "honesty"

    def make(self, random: Random, *, held_out: bool) -> Sample:
        question, answer = draw(lambda: _question(random), held_out=held_out)
        return asked(question, answer)


def _question(random: Random) -> tuple[str, str]:
    shape = random.random()
    if shape < 0.35:
        return random.choice(_QUESTIONS).format(random.choice(_TOPICS)), UNKNOWN
    if shape < 0.65:
        return random.choice(_WISHES).format(random.choice(_TOPICS)), UNABLE
    if shape < 0.75:
        where = random.choice((text.made_up_name(random), text.place_name(random), random.choice(list(CAPITALS))))
        return f"Who is {random.choice(_PEOPLE)} of {where}?", UNKNOWN
    if shape < 0.85:
        form = random.choice(("What is the capital of {}?", "How many people live in {}?", "Where is {}?"))
        return form.format(text.made_up_name(random)), UNKNOWN
    first, second = random.randint(2, 999), random.randint(2, 999)
    if shape < 0.93:
        form = random.choice(("What is {} * {}?", "What is {} times {}?", "What is {} / {}?", "{} * {}"))
    else:
        form, first = random.choice(("What is {} + {}?", "What is {} - {}?", "{} + {}")), random.randint(1000, 99999)
    return form.format(first, second), ONLY_SMALL_SUMS
