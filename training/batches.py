"""Samples to tensors: steps of so many rows, in batches of rows of similar length. Seeded, and resumable by step.

A row whose answer depends on something far back may get gaps in its positions, so that a short row teaches the
distances of a long one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from training.corpus import samples
from training.tokens import END, Encoded, Renderer, encode

_SHORT_PASSAGE, _LONG_PASSAGE = 10, 150
_MOST_TOKENS = 2048
"""In a batch: what a layer makes of so many tokens stays in a core's cache."""

_LENGTHS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048)
_HEIGHTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64)
_TOKENS_PER_BATCH = 300
"""What a batch costs beside its tokens."""
_MULTIPLE = 128
"""Batches have one of few shapes, and multiples of so many labels: a kernel is compiled for each new shape."""


@dataclass(frozen=True, slots=True)
class Batch:
    """int64 ``tokens`` and ``positions`` [rows, length]; ``where`` and ``labels`` as in ``Network.loss``.

    ``weights`` float32, one per label: a long answer counts more than a short one, but less than by its length.
    """

    tokens: Tensor
    positions: Tensor
    where: Tensor
    labels: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """``rows`` per step. Passages around code words grow from step 0 on and are longest at ``late_from``, when the
    second of the stages of the skills' shares begins; another one begins at each step of ``refined_from``."""

    seed: int
    rows: int
    late_from: int
    refined_from: tuple[int, ...]
    context: int

    def stage(self, step: int) -> int:
        return sum(step >= begin for begin in (self.late_from, *self.refined_from))


def make_step(tokenizer: Tokenizer, renderer: Renderer, plan: Plan, step: int) -> list[Batch]:
    """The batches of one step; a function of the plan and the step alone."""
    random = Random(plan.seed * 1_000_003 + step)
    ripeness = min(1.0, step / plan.late_from)
    longest = round(_SHORT_PASSAGE * (_LONG_PASSAGE / _SHORT_PASSAGE) ** ripeness)
    stream = samples(random.getrandbits(48), longest_passage=longest, stage=plan.stage(step))
    drawn = list(islice(stream, plan.rows))
    rows = [row for row in encode(tokenizer, [renderer(s) for s in drawn], drawn) if len(row.tokens) <= plan.context]
    return [_batch(group, height, length, random, plan.context) for group, height, length in _groups(rows)]


def _groups(rows: list[Encoded]) -> Iterator[tuple[list[Encoded], int, int]]:
    """Neighbours in length, longest first; with each group the rows and the length of its batch.

    Of all ways to cut the rows into groups, the one that takes the least time: ``cheapest[i]`` is what the rows from i
    on take, ``heights[i]`` how many rows the batch has that begins with row i.
    """
    rows = sorted(rows, key=lambda row: -len(row.tokens))
    lengths = [next(length for length in _LENGTHS if length >= len(row.tokens)) for row in rows]
    cheapest, heights = [0.0] * (len(rows) + 1), [1] * len(rows)
    for first in reversed(range(len(rows))):
        length, left = lengths[first], len(rows) - first
        fitting = [height for height in _HEIGHTS if height * length <= _MOST_TOKENS] or [1]
        costs = {height: _cost(height, length) + cheapest[first + min(height, left)] for height in fitting}
        heights[first] = min(costs, key=costs.__getitem__)
        cheapest[first] = costs[heights[first]]
    first = 0
    while first < len(rows):
        yield rows[first : first + heights[first]], heights[first], lengths[first]
        first += heights[first]


def _cost(height: int, length: int) -> float:
    """About how long a batch takes, in tokens: attention grows with the square of its length."""
    return height * length * (1 + length / 2600) + _TOKENS_PER_BATCH


def _batch(rows: list[Encoded], height: int, length: int, random: Random, context: int) -> Batch:
    tokens = torch.full((height, length), END)
    positions = torch.arange(length).repeat(height, 1)
    where: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
        if row.stretches and random.random() < 0.5:
            positions[i] += _gaps(random, len(row.tokens), length, context)
        learnt = [at for at in range(len(row.tokens) - 1) if row.learnt[at]]
        where += [i * length + at for at in learnt]
        labels += [row.tokens[at + 1] for at in learnt]
        weights += [len(learnt) ** -0.5] * len(learnt)
    spare = -len(where) % _MULTIPLE
    where, labels, weights = where + [0] * spare, labels + [END] * spare, weights + [0.0] * spare
    return Batch(tokens, positions, torch.tensor(where), torch.tensor(labels), torch.tensor(weights))


def _gaps(random: Random, used: int, length: int, context: int) -> Tensor:
    """What to add to the positions of a row of ``used`` tokens: one or two jumps that stay within the context."""
    shift = torch.zeros(length, dtype=torch.int64)
    room = context - used
    for _ in range(random.randint(1, 2)):
        jump = int(room * random.random() ** 2)
        shift[random.randrange(used) :] += jump
        room -= jump
    return shift
