"""What one run is. Everything that is drawn, is drawn from ``seed``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosSettings:
    """``num_questions`` are asked once without faults, then over and over for ``storm_s`` seconds under faults."""

    seed: int = 0
    storm_s: float = 300.0
    fault_every_s: float = 4.0
    """Mean seconds between two faults."""
    concurrency: int = 8
    num_questions: int = 48
    prompt_lens: tuple[int, int] = (4, 600)
    """Tokens, shortest and longest; half of the prompts are of the shortest tenth of the range."""
    output_lens: tuple[int, int] = (4, 96)
    request_timeout_s: float = 60.0
    """An answer that takes longer is lost."""
    settle_s: float = 60.0
    """How long the stack may take, after the last answer, to be whole and to hold nothing."""
