"""The built-in model's README: what it is for, what it was measured to know, and what it was made of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Part:
    """One of the networks. ``num_bytes``: of its weights' file; ``minutes``: of training, on this machine."""

    num_weights: int
    num_bytes: int
    steps: int
    num_tokens: int
    minutes: float

    @classmethod
    def of(cls, weights: Path, about: Path) -> Part:
        """``about``: what the trainer noted beside its checkpoint."""
        told = json.loads(about.read_text())
        size = weights.stat().st_size
        return cls(size // 2, size, told["step"], told["num_tokens"], told["seconds"] / 60)

    def row(self, name: str) -> str:
        return (
            f"| {name} | {self.num_weights / 1e6:.2f} million | {self.num_bytes / 1e6:.2f} MB | {self.steps:,} | "
            f"{self.num_tokens / 1e6:.1f} million | {self.minutes:.0f} min |"
        )


def write_card(path: Path, scores: str, model: Part, draft: Part, machine: str, guessed: float, count: int) -> None:
    """``scores``: the evaluator's table; ``guessed``: what the draft guesses of the tokens of ``count`` answers."""
    parts = "\n".join((model.row("model"), draft.row("draft")))
    path.write_text(_CARD.format(scores=scores, parts=parts, machine=machine, guessed=guessed, count=count))


_CARD = """\
# Tandem's built-in model

A language model of a few megabytes, for trying Tandem out and for testing it: its answers are right or wrong, so a
damaged KV block shows as a wrong answer and not as other gibberish. It is no assistant. It adds and subtracts numbers
of up to three digits on paper, knows capitals and some dozens of other facts by heart, fills JSON from a sentence for a
given schema, chooses one of the tools it is offered (hermes style, `<tool_call>`) or says that none fits, remembers
what it was told turns ago, finds a code word in a long text, repeats, greets, and says so when it cannot help.

Llama's architecture in Hugging Face's format, bfloat16, a context of 2,048 tokens, byte-level BPE of 1,024 tokens,
English only. `draft/` is a smaller one of the same tokens, for speculative decoding, which Tandem does not do yet. Ask
it with temperature 0, which is its default.

## What it knows

Questions that training never saw, split by content (facts are learnt by heart, so there the questions are known), asked
through OpenAI's client, the router, a prefill and a decode worker. Right means letter for letter.

{scores}

*Code word, long texts*: 75 to 145 sentences, the word anywhere. *Outside its skills*: no skill, but questions written
by hand that no template of the training makes, each once; any of its four honest answers is right.

The draft guesses {guessed:.0%} of the tokens of these answers ({count} of them).

## How it was made

| | weights | file | steps | tokens | time |
|---|---:|---:|---:|---:|---:|
{parts}

`make builtin-model` makes it anew: a seeded program writes all data (nothing was downloaded), learns the tokenizer,
trains both, exports them here, asks the questions above, and writes this page. The weights are the mean of those at
the ends of the last three rounds of training. Times are of {machine}, other work on them included: on 2 cores with
AVX-512 that do nothing else, steps timed all along the way add up to 100 minutes. A run may be interrupted and goes on
where it was. The code is in `training/`.
"""
