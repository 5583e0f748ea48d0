"""What random prompts are made of, so that their lengths are those asked for.

Completions take token ids, whose number is exact on any server. The ids must be within the model's vocabulary, which
OpenAI's API does not tell; so, in this order:

- ``--tokenizer`` (a folder, a tokenizer.json, or a hub name): its tokens, sent as text for both backends. Only tokens
  that survive a round trip alone are used; beside each other a few may still merge.
- ``--vocab-size N``: all ids below N.
- the server's /tokenize, asked about a text that is made of all pairs of letters: the ids it answers. Tandem and vLLM
  have it.
- else the ids from 100 to 999, which every common model has.

Chat takes text; without a tokenizer it is made of short common words, each about a token. The server counts what the
prompts were (``usage``), and the report shows that.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from bench.settings import Backend, TokenChoice
from proto.errors import SettingsError

Prompt = str | tuple[int, ...]

PROBE = " ".join(map("".join, product(string.ascii_lowercase, repeat=2))) + " " + string.digits + string.punctuation
_TEXT = """
about after air all and animal answer back ball because big bird black blue boat book both box boy bread call
car city clear close cold come cook cut dark day deep do dog door down draw drive dry early earth eat eight
end face fact fall far farm fast father few field fine fire first fish five follow food foot four friend full
game gold good great green group half hand hard head hear heavy help high hold home horse hot house
"""
_WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens to draw from, and how a drawn sequence is sent."""

    tokens: Sequence[int]
    render: Callable[[Sequence[int]], Prompt]
    source: str
    """Where it came from, for the report."""

    def draw(self, rng: random.Random, count: int) -> list[int]:
        return rng.choices(self.tokens, k=count)


def ids_below(size: int) -> Vocabulary:
    return Vocabulary(range(size), tuple, f"token ids below {size}")


def ids_of_probe(ids: Sequence[int] | None) -> Vocabulary:
    """From what /tokenize answered about PROBE; None where the server has no such thing."""
    if ids:
        found = sorted(set(ids))
        return Vocabulary(found, tuple, f"{len(found)} token ids from the server's /tokenize")
    return Vocabulary(range(100, 1000), tuple, "token ids 100 to 999")


def words() -> Vocabulary:
    return Vocabulary(
        range(len(_WORDS)), lambda ids: " ".join(_WORDS[i] for i in ids), "common words, a token or so each"
    )


def from_tokenizer(name: str) -> Vocabulary:
    """Raises SettingsError where there is no such tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_tokenizer_file(name)))
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    ids = [number for number in sorted(tokenizer.get_vocab().values()) if number not in special]
    texts = tokenizer.decode_batch([[number] for number in ids])
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    stable = [number for number, encoding in zip(ids, encoded, strict=True) if encoding.ids == [number]]
    if not stable:
        raise SettingsError(f"--tokenizer {name}: no token survives decoding and encoding.")
    return Vocabulary(stable, lambda drawn: str(tokenizer.decode(list(drawn))), f"{len(stable)} tokens of {name}")


def _tokenizer_file(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    if (path / "tokenizer.json").is_file():
        return path / "tokenizer.json"
    if path.is_dir():
        raise SettingsError(f"--tokenizer {name}: there is no tokenizer.json.")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "tokenizer.json"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"--tokenizer {name} is no folder, and the hub does not give it: {error}") from error


def without_asking(choice: TokenChoice, backend: Backend) -> Vocabulary | None:
    """The vocabulary that the settings decide; None where the server must be asked."""
    if choice.tokenizer is not None:
        return from_tokenizer(choice.tokenizer)
    if backend is Backend.CHAT:
        return words()
    return None if choice.vocab_size is None else ids_below(choice.vocab_size)
