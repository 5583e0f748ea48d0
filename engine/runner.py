"""Runs one step: copies blocks, computes the batch, samples. Called on the engine's thread, one step at a time."""

from __future__ import annotations

from collections.abc import Iterator
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
        self._check_finite(logits)
        draws = [
            Draw(logit_row, spec)
            for row, logit_row in zip(batch.rows, flattened.logit_row, strict=True)
            if logit_row is not None
            for spec in row.samples
        ]
        sampled = iter(sample(logits, draws, self._model.kernels.draw))
        return tuple(_take(sampled, len(row.samples)) for row in batch.rows)

    def _check_finite(self, logits: torch.Tensor) -> None:
        bad = int((~torch.isfinite(logits.sum(-1))).sum())
        if bad:
            raise LocalFault(
                f"The model gave logits that are not finite for {bad} of {logits.shape[0]} sequences in this step: "
                "damaged weights, or values too large for the model's type."
            )


def _take(sampled: Iterator[Sampled], count: int) -> tuple[Sampled, ...]:
    return tuple(next(sampled) for _ in range(count))
