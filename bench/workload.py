"""Which requests are sent, and when: both follow from the seed alone. Does no I/O but reading a custom dataset.

The first k requests are the same however many are made, so runs of different lengths are comparable; warm-ups are made
after the measured requests, so that no measured prompt has been seen before (but for prefixes meant to be shared).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path

from bench.settings import Load, PrefixData, RandomData
from bench.vocabulary import Prompt, Vocabulary
from proto.errors import SettingsError
from router.values import Json


@dataclass(frozen=True, slots=True)
class Request:
    """``prompt_len`` is in tokens, None where only the server knows it."""

    prompt: Prompt
    output_len: int
    prompt_len: int | None = None


def make_requests(dataset: RandomData | PrefixData, vocabulary: Vocabulary, count: int, seed: str) -> list[Request]:
    """``count`` requests; the same seed and vocabulary give the same."""
    rng = random.Random(f"prompts {seed}")
    if isinstance(dataset, RandomData):
        return list(islice(_random(dataset, vocabulary, rng), count))
    return list(islice(_prefixed(dataset, vocabulary, rng), count))


def _random(dataset: RandomData, vocabulary: Vocabulary, rng: random.Random) -> Iterator[Request]:
    prefix = vocabulary.draw(rng, dataset.prefix_len)
    while True:
        input_len = _about(dataset.input_len, dataset.range_ratio, rng)
        output_len = _about(dataset.output_len, dataset.range_ratio, rng)
        yield _request(vocabulary, [*prefix, *vocabulary.draw(rng, input_len)], output_len)


def _prefixed(dataset: PrefixData, vocabulary: Vocabulary, rng: random.Random) -> Iterator[Request]:
    """Every prefix comes once in each ``num_prefixes`` requests, in an order drawn anew."""
    prefixes = [vocabulary.draw(rng, dataset.prefix_len) for _ in range(dataset.num_prefixes)]
    while True:
        for prefix in rng.sample(prefixes, len(prefixes)):
            yield _request(vocabulary, [*prefix, *vocabulary.draw(rng, dataset.suffix_len)], dataset.output_len)


def _request(vocabulary: Vocabulary, tokens: list[int], output_len: int) -> Request:
    return Request(vocabulary.render(tokens), output_len, len(tokens))


def _about(length: int, ratio: float, rng: random.Random) -> int:
    return max(1, rng.randint(math.floor(length * (1 - ratio)), math.ceil(length * (1 + ratio))))


def read_jsonl(path: Path, output_len: int) -> list[Request]:
    """A custom dataset's requests, in the file's order. Raises SettingsError that names the line."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--dataset-path {path}: {error}") from error
    rows = [_read_row(line, f"{path}:{number}", output_len) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise SettingsError(f"--dataset-path {path}: there is no prompt in it.")
    return rows


def _read_row(line: str, place: str, output_len: int) -> Request:
    try:
        row: Json = json.loads(line)
    except ValueError as error:
        raise SettingsError(f"{place}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise SettingsError(f"{place}: expects an object with a prompt.")
    wanted = row.get("output_tokens", output_len)
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        raise SettingsError(f"{place}: output_tokens must be a whole number of at least 1, not {wanted!r}.")
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt:
        return Request(prompt, wanted)
    ids = tuple(token for token in prompt if isinstance(token, int)) if isinstance(prompt, list) else ()
    if not ids or not isinstance(prompt, list) or len(ids) < len(prompt):
        raise SettingsError(f"{place}: prompt must be a text or a list of token ids.")
    return Request(ids, wanted, len(ids))


def arrival_times(load: Load, seed: str) -> list[float]:
    """Seconds after the start at which each request is due; the first is 0.

    Gaps are drawn from a gamma distribution of shape ``burstiness`` (1: Poisson; less: bursts; more: an even beat),
    then scaled so that the mean gap is exactly 1 / ``request_rate``: two runs at one rate are offered the same load.
    """
    if math.isinf(load.request_rate):
        return [0.0] * load.num_prompts
    rng = random.Random(f"arrivals {seed}")
    gaps = [rng.gammavariate(load.burstiness, 1.0) for _ in range(load.num_prompts - 1)]
    total = sum(gaps)
    scale = len(gaps) / load.request_rate / total if total else 0.0
    return [at * scale for at in accumulate(gaps, initial=0.0)]
