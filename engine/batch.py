"""A step as a value: what the scheduler's decision asks the runner to compute. Holds numbers, no tensors.

tokens of one sequence:  [0 ........ start) [start ...... start + len(tokens))
                         in KV already       computed and written by this step
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proto.request import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """Draw one token from a row's last logits, for one choice.

    ``seed`` is the choice's own (``derive_seed``); ``position`` counts its generated tokens, so the draw is a pure
    function of (logits, params, seed, position). ``prompt`` and ``output`` feed the penalties; ``suppressed`` token ids
    cannot be drawn (EOS and stop tokens before ``min_tokens``).
    """

    choice: int
    seed: int
    position: int
    params: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]
    suppressed: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part in a step: a prefill chunk or a decode token; both are the same to the forward pass.

    ``block_table`` lists the blocks of positions 0 to start + len(tokens) - 1. ``samples`` is empty for a chunk that is
    not the prompt's last, and has one entry per choice when a prompt's last token feeds several.

    A row that ``follows`` has one token, which is not known yet: the one that this draw (in the order of rows and their
    samples) of the batch submitted just before it gives. ``tokens`` has a stand-in, and the sample's ``output`` ends
    before it.
    """

    tokens: Sequence[int]
    start: int
    block_table: Sequence[int]
    samples: tuple[SampleSpec, ...] = ()
    follows: int | None = None


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Block ``copies`` (source, destination) are made first, then all ``rows`` run in one ragged forward pass."""

    rows: tuple[Row, ...]
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)


@dataclass(frozen=True, slots=True)
class Sampled:
    token: int
    logprobs: TokenLogprobs | None = None


StepResult = tuple[tuple[Sampled, ...] | None, ...]
"""Per row, per sample of that row, in the batch's order. None: the row's logits are not finite, or all the same, and
any token would be a lie. Numbers too large for the model's type, damaged weights, or damaged keys and values."""
