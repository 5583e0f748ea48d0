"""Runs one step: copies blocks, computes the batch, samples. Called on the engine's thread, one step at a time.

On the CPU a step is over when it is submitted; ``engine.device_runner`` is for devices that compute by themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from engine.batch import Sampled, StepBatch, StepResult
from engine.facts import EngineFacts
from engine.kv_memory import KvMemory
from engine.model import Decoder
from engine.sampler import Draw, sample
from engine.step_inputs import flatten
from proto.errors import LocalFault


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
        """One tuple per row, with one ``Sampled`` per sample of that row, in the batch's order.

        Raises LocalFault when logits are not finite: broken weights or an overflow, and any token would be a lie.
        """
        for source, destination in batch.copies:
            self._kv.copy(source, destination)
        if not batch.rows:
            return ()
        flattened = flatten(batch, self._facts.block_size, self._model.device)
        logits = self._model.forward(flattened.inputs, self._kv.paged)
        check_finite(int((~torch.isfinite(logits.sum(-1))).sum()), logits.shape[0])
        draws = draws_of(batch, flattened.logit_row)
        return per_row(batch, sample(logits, draws, self._model.kernels.draw))


def draws_of(batch: StepBatch, logit_row: Sequence[int | None]) -> list[Draw]:
    """What to draw, in the order of rows and their samples. ``logit_row``: which row of logits is each row's."""
    return [
        Draw(number, spec, row.follows)
        for row, number in zip(batch.rows, logit_row, strict=True)
        if number is not None
        for spec in row.samples
    ]


def per_row(batch: StepBatch, sampled: Iterable[Sampled]) -> StepResult:
    """What was drawn, shared out to the batch's rows."""
    drawn = iter(sampled)
    return tuple(tuple(next(drawn) for _ in row.samples) for row in batch.rows)


def check_finite(num_bad: int, num_rows: int) -> None:
    """Raises LocalFault where some rows' logits are not finite: no token would mean anything."""
    if num_bad:
        raise LocalFault(
            f"The model gave logits that are not finite for {num_bad} of {num_rows} sequences in this step: "
            "damaged weights, or values too large for the model's type."
        )
