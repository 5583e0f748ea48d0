"""Counting what an engine does. Knows numbers; exporting them is the owner's work."""

from __future__ import annotations

import math
from dataclasses import dataclass

RATE_WINDOW_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters since the start (first eight) and gauges of now. Tokens unless named otherwise."""

    num_steps: int
    num_preemptions: int
    cache_query_tokens: int
    cache_hit_tokens: int
    prompt_tokens_computed: int
    """Rows of more than a decode token, recomputation after preemptions included."""
    generated_tokens: int
    busy_s: float
    num_failed: int
    """Requests whose logits were not finite."""
    num_running: int
    num_waiting: int
    num_held: int
    num_reserved: int
    num_free_blocks: int
    num_blocks: int


@dataclass(slots=True)
class Meter:
    """The counters in the making."""

    num_steps: int = 0
    num_preemptions: int = 0
    cache_query_tokens: int = 0
    cache_hit_tokens: int = 0
    prompt_tokens_computed: int = 0
    generated_tokens: int = 0
    busy_s: float = 0.0
    num_failed: int = 0
    _recent_tokens: float = 0.0
    _recent_s: float = 0.0

    @property
    def prompt_tokens_per_s(self) -> float:
        """Prompt tokens per second of the steps that computed any, lately; 0 when there was none."""
        return self._recent_tokens / self._recent_s if self._recent_s > 0 else 0.0

    def count_step(self, num_prompt_tokens: int, num_generated: int, duration_s: float) -> None:
        self.num_steps += 1
        self.prompt_tokens_computed += num_prompt_tokens
        self.generated_tokens += num_generated
        self.busy_s += duration_s
        if num_prompt_tokens > 0:
            kept = math.exp(-duration_s / RATE_WINDOW_S)
            self._recent_tokens = self._recent_tokens * kept + num_prompt_tokens
            self._recent_s = self._recent_s * kept + duration_s

    def count_match(self, num_queried: int, num_hit: int) -> None:
        self.cache_query_tokens += num_queried
        self.cache_hit_tokens += num_hit

    def snapshot(
        self,
        *,
        num_running: int,
        num_waiting: int,
        num_held: int,
        num_reserved: int,
        num_free_blocks: int,
        num_blocks: int,
    ) -> EngineStats:
        return EngineStats(
            num_steps=self.num_steps,
            num_preemptions=self.num_preemptions,
            cache_query_tokens=self.cache_query_tokens,
            cache_hit_tokens=self.cache_hit_tokens,
            prompt_tokens_computed=self.prompt_tokens_computed,
            generated_tokens=self.generated_tokens,
            busy_s=self.busy_s,
            num_failed=self.num_failed,
            num_running=num_running,
            num_waiting=num_waiting,
            num_held=num_held,
            num_reserved=num_reserved,
            num_free_blocks=num_free_blocks,
            num_blocks=num_blocks,
        )
