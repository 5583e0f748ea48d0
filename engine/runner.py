"""Runs one step: copies blocks, computes the batch, samples. Called on the engine's thread, one step at a time.

On the CPU a step is over when it is submitted; ``engine.device_runner`` is for devices that compute by themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import Sampled, StepBatch, StepResult
from engine.facts import EngineFacts
from engine.kv_memory import KvMemory
from engine.model import Decoder
from engine.sampler import Draw, sample
from engine.step_inputs import flatten


@dataclass(frozen=True, slots=True)
class Done:
    """A step that is over."""

    step_result: StepResult

    def result(self) -> StepResult:
        return self.step_result


class Runner:
    """A model and its KV memory, as a function from batch to tokens."""

    def __init__(self, model: Decoder, kv: KvMemory, facts: EngineFacts) -> None:
        self._model = model
        self._kv = kv
        self._facts = facts

    def submit(self, batch: StepBatch) -> Done:
        """Computes the batch at once: no step runs while another one is prepared."""
        return Done(self.run(batch))

    def run(self, batch: StepBatch) -> StepResult:
        """One tuple per row, with one ``Sampled`` per sample of that row, in the batch's order; None for a row whose
        logits are not sound."""
        for source, destination in batch.copies:
            self._kv.copy(source, destination)
        if not batch.rows:
            return ()
        flattened = flatten(batch, self._facts.block_size, self._model.device)
        logits = self._model.forward(flattened.inputs, self._kv.paged)
        is_sound = sound_rows(logits)
        if not is_sound.all():
            logits = logits.masked_fill(~is_sound[:, None], 0.0)  # what is drawn of these is thrown away
        draws = draws_of(batch, flattened.logit_row)
        drawn = sample(logits, draws, self._model.kernels.draw)
        return per_row(batch, flattened.logit_row, drawn, is_sound)


def sound_rows(logits: Tensor) -> Tensor:
    """Bool ``[rows]`` of ``logits [rows, vocab_size]``: whether all of a row's are finite, and not all the same. A norm
    makes zeros of numbers whose squares are too large, and so all logits the same."""
    low, high = logits.aminmax(dim=-1)
    return torch.isfinite(low) & torch.isfinite(high) & (low < high)


def draws_of(batch: StepBatch, logit_row: Sequence[int]) -> list[Draw]:
    """What to draw, in the order of rows and their samples. ``logit_row``: which row of logits is each row's."""
    return [
        Draw(number, spec, row.follows)
        for row, number in zip(batch.rows, logit_row, strict=True)
        for spec in row.samples
    ]


def per_row(batch: StepBatch, logit_row: Sequence[int], sampled: Iterable[Sampled], is_sound: Tensor) -> StepResult:
    """What was drawn, shared out to the batch's rows. ``is_sound``: as ``sound_rows``, on the host."""
    drawn = iter(sampled)
    shared = [tuple(next(drawn) for _ in row.samples) for row in batch.rows]
    sound: list[bool] = is_sound.tolist()
    return tuple(each if sound[number] else None for each, number in zip(shared, logit_row, strict=True))
