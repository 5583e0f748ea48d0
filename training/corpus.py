"""All skills together: how often each is practised, and the stream of samples that training sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random

from router.values import JsonObject
from training.sample import Sample, Skill
from training.skills.arithmetic import Arithmetic
from training.skills.codeword import CodeWord
from training.skills.extraction import Extraction
from training.skills.facts import Facts
from training.skills.honesty import Honesty
from training.skills.manners import Manners
from training.skills.recall import Recall
from training.skills.repetition import Repetition
from training.skills.tooling import Tooling

_FACTS, _MANNERS, _HONESTY = Facts(), Manners(), Honesty()
_SHORT: tuple[Skill, ...] = (_FACTS, _MANNERS, _HONESTY)
SKILLS: tuple[Skill, ...] = (
    Arithmetic(),
    _FACTS,
    Extraction(),
    Tooling(_SHORT),
    Recall(_SHORT),
    CodeWord(),
    Repetition(),
    _MANNERS,
    _HONESTY,
)
_SHARES = (
    (18, 8, 16, 13, 12, 8, 10, 4, 9),
    (18, 3, 18, 24, 9, 6, 14, 2, 8),
    (12, 3, 13, 42, 12, 6, 6, 2, 4),
    (9, 3, 6, 54, 8, 4, 12, 2, 2),
    (8, 3, 6, 38, 24, 4, 14, 1, 2),
    (8, 2, 5, 24, 36, 4, 17, 1, 3),
    (7, 3, 6, 36, 16, 7, 20, 1, 4),
    (5, 2, 4, 22, 32, 5, 26, 1, 3),
)
"""Per stage: what is learnt soon gives way to what takes longer."""
_SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Be brief.",
    "You are Tandem.",
)


def samples(seed: int, *, longest_passage: int, stage: int = 0) -> Iterator[Sample]:
    """Training samples without end, the same for the same seed. ``longest_passage``: sentences around a code word."""
    shares = _SHARES[stage]
    random = Random(seed)
    skills = [CodeWord(longest_passage) if isinstance(skill, CodeWord) else skill for skill in SKILLS]
    while True:
        (skill,) = random.choices(skills, shares)
        yield with_system(random, skill.make(random, held_out=False))


def with_system(random: Random, sample: Sample) -> Sample:
    """Some conversations begin with a system message, as clients send one."""
    if random.random() > 0.15:
        return sample
    system: JsonObject = {"role": "system", "content": random.choice(_SYSTEM)}
    return replace(sample, messages=(system, *sample.messages))
