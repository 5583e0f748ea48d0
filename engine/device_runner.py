"""Runs steps on a device that computes by itself: what is submitted is queued there, and nobody waits for it.

    engine's thread   submit 1   submit 2 ............ result 1   submit 3 ............ result 2
    device            └─ 1 ───────────────────────────▶└─ 2 ─────────────────────────▶ └─ 3 ──
    page-locked memory                      tokens of 1 ┘                  tokens of 2 ┘

A step's tokens stay on the device as the next one's input; a copy of them, and of whose logits were sound, comes back
with an event. Called on the engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import StepBatch, StepResult
from engine.device_sampler import Drawn, sample_on_device
from engine.facts import EngineFacts
from engine.graphs import DecodeGraphs
from engine.kv_memory import KvMemory
from engine.model import Decoder
from engine.runner import draws_of, per_row, sound_rows
from engine.sampler import Draw
from engine.step_inputs import flatten


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """A step that was submitted. ``drawn`` and ``is_sound`` are on the host, and filled once ``wait`` has returned."""

    batch: StepBatch
    logit_row: Sequence[int]
    draws: Sequence[Draw]
    drawn: Drawn | None
    is_sound: Tensor
    wait: Callable[[], None]

    def result(self) -> StepResult:
        """As ``Runner.run``."""
        self.wait()
        sampled = [] if self.drawn is None else self.drawn.sampled(self.draws)
        return per_row(self.batch, self.logit_row, sampled, self.is_sound)


class DeviceRunner:
    """As ``Runner``, for batches whose rows may follow the draws of the one submitted before."""

    def __init__(self, model: Decoder, kv: KvMemory, facts: EngineFacts, graphs: DecodeGraphs | None = None) -> None:
        self._model = model
        self._kv = kv
        self._facts = facts
        self._graphs = graphs
        self._tokens: Tensor | None = None

    def run(self, batch: StepBatch) -> StepResult:
        return self.submit(batch).result()

    @torch.inference_mode()
    def submit(self, batch: StepBatch) -> DeviceStep:
        """Queues the step."""
        device = self._model.device
        for source, destination in batch.copies:
            self._kv.copy(source, destination)
        logits, logit_row = self._forward(batch)
        draws = draws_of(batch, logit_row)
        drawn = None
        if draws:
            kernels = self._model.kernels
            drawn = sample_on_device(
                logits, draws, kernels.draw, self._tokens, is_batch_invariant=kernels.is_batch_invariant
            )
            self._tokens = drawn.tokens
        here = None if drawn is None else drawn.on_host()
        is_sound = sound_rows(logits).to("cpu", non_blocking=True)
        return DeviceStep(batch, logit_row, draws, here, is_sound, _mark(device))

    def _forward(self, batch: StepBatch) -> tuple[Tensor, Sequence[int]]:
        """Logits, and which row of them is each row's."""
        if self._graphs is not None and self._graphs.takes(batch.rows):
            return self._graphs.run(batch.rows, self._tokens), range(len(batch.rows))
        flattened = flatten(batch, self._facts.block_size, self._model.device, self._tokens)
        return self._model.forward(flattened.inputs, self._kv.paged), flattened.logit_row


def _mark(device: torch.device) -> Callable[[], None]:
    """What waits until the device has done what is queued on it now."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record()
    return event.synchronize
