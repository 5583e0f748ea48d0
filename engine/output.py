"""What a step tells the engine's owner, as values."""

from __future__ import annotations

from dataclasses import dataclass

from proto.ids import BlockId, RequestId
from proto.request import TokenOut


@dataclass(frozen=True, slots=True)
class Filled:
    """Blocks of a held prompt that are complete and will not change: safe to read until release() or abort().

    ``blocks`` are the prompt's blocks from ``first_index`` on. ``sealed``: they end with the prompt's last one, of
    which ``num_tokens_last`` tokens are valid and the rest is zero (0 while not sealed).
    """

    request: RequestId
    blocks: tuple[BlockId, ...]
    first_index: int
    sealed: bool = False
    num_tokens_last: int = 0


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One step. ``num_cached`` goes with ``started``: prompt tokens that each one found in the prefix cache.

    ``failed`` requests have no more tokens: the model gave no finite numbers for one of their choices. What they had
    announced stays until release() or abort().
    """

    tokens: tuple[TokenOut, ...] = ()
    started: tuple[RequestId, ...] = ()
    filled: tuple[Filled, ...] = ()
    preempted: tuple[RequestId, ...] = ()
    failed: tuple[RequestId, ...] = ()
    num_tokens: int = 0
    duration_s: float = 0.0
    num_cached: tuple[int, ...] = ()
