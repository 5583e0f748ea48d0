"""How well a draft guesses: the share of answers' tokens that it would have said, given all that came before each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional

from training.export import load
from training.sample import Sample
from training.tokens import Renderer, encode


@torch.no_grad()
def share_guessed(folder: Path, samples: Sequence[Sample]) -> float:
    """0 to 1, over all tokens of the samples' answers, ends included. ``folder``: of an exported network."""
    network, tokenizer, renderer = load(folder), Tokenizer.from_file(str(folder / "tokenizer.json")), Renderer()
    guessed = total = 0
    for row in encode(tokenizer, [renderer(sample) for sample in samples], samples):
        tokens = torch.tensor([row.tokens])
        hidden = network(tokens, torch.arange(tokens.shape[1])[None])[0, :-1]
        said = functional.linear(hidden, network.embed_tokens.weight.to(hidden.dtype)).argmax(-1)
        learnt = torch.tensor(row.learnt[:-1])
        guessed += int((said == tokens[0, 1:])[learnt].sum())
        total += int(learnt.sum())
    return guessed / total
