"""Drives a model by hand, without a scheduler: sequences with scattered blocks, mixed batches, chosen chunk sizes."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from engine.batch import Row, SampleSpec, StepBatch
from engine.config_file import ConfigFile
from engine.families import read_spec
from engine.model import Decoder
from engine.step_inputs import flatten
from engine.weights import SafetensorsSource
from kernels.dispatch import REFERENCE
from kernels.types import Kernels, PagedKv
from proto.request import SamplingParams

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0, seed=0)


def load_model(folder: Path, dtype: torch.dtype = torch.float32, kernels: Kernels = REFERENCE) -> Decoder:
    spec = read_spec(ConfigFile.load(folder / "config.json"))
    return Decoder(spec, SafetensorsSource(folder, dtype, CPU), kernels, CPU)


def greedy(choice: int = 0) -> SampleSpec:
    return SampleSpec(choice=choice, seed=choice, position=0, params=GREEDY, prompt=(), output=())


class Driver:
    """KV memory and block tables for hand-made steps. Memory starts as NaN: reading what was not written shows."""

    def __init__(self, model: Decoder, num_blocks: int = 256, block_size: int = 16) -> None:
        spec = model.spec
        self.model = model
        self.block_size = block_size
        shape = (num_blocks, spec.num_layers, 2, block_size, spec.kv_heads, spec.head_dim)
        self.kv = torch.full(shape, torch.nan)
        self._free = list(range(num_blocks))
        random.Random(0).shuffle(self._free)

    def blocks(self, num_tokens: int) -> list[int]:
        """Fresh blocks, in no order, zeroed as a pool's are before first use."""
        taken = [self._free.pop() for _ in range(-(-num_tokens // self.block_size))]
        self.kv[taken] = 0
        return taken

    def forward(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """Last-token logits of each row."""
        flattened = flatten(StepBatch(tuple(rows)), self.block_size, CPU)
        logits = self.model.forward(flattened.inputs, PagedKv(self.kv))
        return [logits[index] for index, row in zip(flattened.logit_row, rows, strict=True) if row.samples]

    def generate(
        self, prompts: Iterable[Sequence[int]], chunk_size: int, num_new: int
    ) -> list[tuple[list[int], list[torch.Tensor]]]:
        """All prompts side by side, ``chunk_size`` tokens of each per step, then greedily ``num_new`` tokens each.

        Returns per prompt its tokens (prompt and new ones) and the logits behind each new one.
        """
        sequences = [list(prompt) for prompt in prompts]
        lengths = [len(sequence) for sequence in sequences]
        tables = [self.blocks(length + num_new) for length in lengths]
        done = [0] * len(sequences)
        seen: list[list[torch.Tensor]] = [[] for _ in sequences]
        while unfinished := [i for i, length in enumerate(lengths) if len(sequences[i]) < length + num_new]:
            rows = [
                Row(sequences[i][done[i] : done[i] + chunk_size], done[i], tables[i], (greedy(),)) for i in unfinished
            ]
            for i, row, logits in zip(unfinished, rows, self.forward(rows), strict=True):
                done[i] += len(row.tokens)
                if done[i] == len(sequences[i]):
                    seen[i].append(logits)
                    sequences[i].append(int(logits.argmax()))
        return list(zip(sequences, seen, strict=True))
