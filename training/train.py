"""Trains a network on the corpus. Seeded; resumable: what is needed to go on is saved every few minutes.

The learning rate warms up, stays, and falls to nothing over the last part of the steps. Then, from a part of its
height, it falls again and again, while the samples are mostly of what has not been learnt by then. Each of those makes
some skills a little better and others a little worse: the result is the mean of what the last few ended with.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from training.batches import Batch, Plan, make_step
from training.model import Network, Shape
from training.priming import prime
from training.tokens import Renderer

_WARM_UP_STEPS = 40
_REFINE_RATE = 0.4
"""Where the rates begin to fall again."""
_SAVE_EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """``cool_down``: the part of the first ``steps`` over which the learning rates fall. ``refinements``: how
    many steps each of those has that follow. ``num_averaged``: of how many the ends' mean is the result.

    Rates: of matrices, of the rest.
    """

    steps: int
    refinements: tuple[int, ...]
    plan: Plan
    matrix_rate: float = 5e-3
    other_rate: float = 4e-3
    cool_down: float = 0.35
    num_averaged: int = 3

    @property
    def all_steps(self) -> int:
        return self.steps + sum(self.refinements)

    @property
    def ends(self) -> tuple[int, ...]:
        """The steps at which the rates have fallen to nothing."""
        return tuple(accumulate(self.refinements, initial=self.steps))

    def rate(self, step: int) -> float:
        """The share of the full learning rate at ``step``."""
        if step >= self.steps:
            into, length = self._refinement(step - self.steps)
            return _REFINE_RATE * min((into + 1) / _WARM_UP_STEPS, 1 - into / length)
        left = (self.steps - step) / (self.steps * self.cool_down)
        return min(1.0, (step + 1) / _WARM_UP_STEPS, max(left, 0.0))

    def _refinement(self, into: int) -> tuple[int, int]:
        """How far into which of them, by its length, the step is that comes ``into`` steps after the first ones."""
        for length in self.refinements:
            if into < length:
                return into, length
            into -= length
        return 1, 1


class Trainer:
    """A network and its optimizers; ``file`` holds them between runs.

    ``num_tokens`` and ``seconds``: what all runs together have read, padding included, and taken.
    """

    def __init__(self, shape: Shape, recipe: Recipe, tokenizer: Tokenizer, file: Path, device: torch.device) -> None:
        torch.manual_seed(recipe.plan.seed)
        self.network = Network(shape)
        prime(self.network)
        self.network.to(device)
        self.step = 0
        self.num_tokens = 0
        self.seconds = 0.0
        self._since = 0.0
        self._ends: list[dict[str, Tensor]] = []
        self._recipe, self._tokenizer, self._file, self._device = recipe, tokenizer, file, device
        matrices = [p for name, p in self.network.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in self.network.named_parameters() if p.ndim != 2 or "embed" in name]
        self._optimizers: tuple[tuple[torch.optim.Optimizer, float], ...] = (
            *(
                (torch.optim.Muon(part, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"), recipe.matrix_rate)
                for part in (matrices[::2], matrices[1::2])  # side by side
            ),
            (torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True), recipe.other_rate),
        )
        # A core of its own for every batch: threads that share one wait for each other at every small operation.
        self._num_workers = 1 if device.type == "cuda" else len(os.sched_getaffinity(0))
        torch.set_num_threads(1)
        if file.exists():
            self._load()

    def run(self, say: Callable[[str], None], *, until: int | None = None) -> None:
        """Goes on to the last step, or ``until``; saves at the end."""
        last = min(until or self._recipe.all_steps, self._recipe.all_steps)
        self._since = saved = started = time.monotonic()
        seen = steps = 0
        total = 0.0
        with ThreadPoolExecutor(1) as ahead:
            renderer = Renderer()
            coming = ahead.submit(make_step, self._tokenizer, renderer, self._recipe.plan, self.step)
            while self.step < last:
                batches = coming.result()
                coming = ahead.submit(make_step, self._tokenizer, renderer, self._recipe.plan, self.step + 1)
                total += self._learn(batches)
                num_tokens = sum(batch.tokens.numel() for batch in batches)
                seen, steps = seen + num_tokens, steps + 1
                self.step, self.num_tokens = self.step + 1, self.num_tokens + num_tokens
                if self.step in self._recipe.ends:
                    self._keep_end()
                now = time.monotonic()
                if self.step % 10 == 0:
                    rate = seen / (now - started)
                    say(f"step {self.step}/{self._recipe.all_steps} loss {total / steps:.4f} {rate:.0f} tokens/s")
                    started, seen, steps, total = now, 0, 0, 0.0
                if now - saved > _SAVE_EVERY_S:
                    saved = now
                    self._save()
        self._save()

    def result(self) -> Network:
        """The mean of the last ends; before any, the network as it is."""
        network = Network(self.network.shape)
        ends = self._ends or [self.network.state_dict()]
        network.load_state_dict({name: sum(end[name].cpu() for end in ends) / len(ends) for name in ends[0]})
        return network

    def _keep_end(self) -> None:
        weights = {name: weight.clone() for name, weight in self.network.state_dict().items()}
        self._ends = [*self._ends, weights][-self._recipe.num_averaged :]

    def _learn(self, batches: list[Batch]) -> float:
        """One step of the optimizers; the step's loss."""
        weight = sum(float(batch.weights.sum()) for batch in batches)
        largest_first = sorted(batches, key=lambda batch: -batch.tokens.numel())
        total = 0.0
        with ThreadPoolExecutor(self._num_workers, "worker", torch.set_num_threads, (1,)) as workers:
            for loss, gradients in workers.map(lambda batch: self._gradients(batch, weight), largest_first):
                total += loss
                for parameter, gradient in zip(self.network.parameters(), gradients, strict=True):
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            list(workers.map(self._follow_gradients, *zip(*self._optimizers, strict=True)))
        return total

    def _follow_gradients(self, optimizer: torch.optim.Optimizer, rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate * self._recipe.rate(self.step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _gradients(self, batch: Batch, weight: float) -> tuple[float, tuple[Tensor, ...]]:
        """The share in the step's loss of one batch, and its gradients. Runs in several threads at once."""
        parts = (batch.tokens, batch.positions, batch.where, batch.labels, batch.weights)
        tokens, positions, where, labels, weights = (part.to(self._device) for part in parts)
        loss = (self.network.losses(tokens, positions, where, labels) * weights).sum() / weight
        return loss.item(), torch.autograd.grad(loss, list(self.network.parameters()))

    def _save(self) -> None:
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
        draft = self._file.with_suffix(".draft")
        optimizers = [optimizer.state_dict() for optimizer, _ in self._optimizers]
        progress = {"step": self.step, "num_tokens": self.num_tokens, "seconds": self.seconds}
        weights = {"network": self.network.state_dict(), "ends": self._ends}
        torch.save({**progress, **weights, "optimizers": optimizers}, draft)
        draft.replace(self._file)
        about = {**progress, "recipe": asdict(self._recipe), "shape": asdict(self.network.shape)}
        self._file.with_suffix(".json").write_text(json.dumps(about, indent=2))

    def _load(self) -> None:
        saved = torch.load(self._file, map_location=self._device, weights_only=True)
        self.step, self.num_tokens, self.seconds = saved["step"], saved["num_tokens"], saved["seconds"]
        self.network.load_state_dict(saved["network"])
        self._ends = saved["ends"]
        for (optimizer, _), state in zip(self._optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
