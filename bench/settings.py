"""What one measurement is: the server, the prompts, the load, and what is reported. Knows no flags and does no I/O."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from router.values import JsonObject

METRICS = ("ttft", "tpot", "itl", "e2el")
"""The latencies that can be reported; ``bench.outcome`` defines them."""


class Backend(enum.StrEnum):
    COMPLETIONS = "openai"
    CHAT = "openai-chat"


@dataclass(frozen=True, slots=True)
class Target:
    """A server. ``base_url`` has no trailing slash and no /v1; ``endpoint`` starts with a slash."""

    base_url: str
    endpoint: str = "/v1/completions"
    backend: Backend = Backend.COMPLETIONS
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 3600.0
    """After this long a request has failed."""
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Sent with every request, over those of our own."""


@dataclass(frozen=True, slots=True)
class RandomData:
    """``prefix_len`` tokens that all prompts share, then random ones. Lengths vary evenly within ±``range_ratio``."""

    input_len: int = 1024
    output_len: int = 128
    range_ratio: float = 0.0
    prefix_len: int = 0


@dataclass(frozen=True, slots=True)
class PrefixData:
    """Each prompt is one of ``num_prefixes`` prefixes and a suffix of its own."""

    prefix_len: int = 256
    suffix_len: int = 256
    num_prefixes: int = 10
    output_len: int = 128


@dataclass(frozen=True, slots=True)
class CustomData:
    """JSON lines: ``prompt`` (text or token ids) and, where not ``output_len``, ``output_tokens``."""

    path: Path
    output_len: int = 256


Dataset = RandomData | PrefixData | CustomData


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """Where random prompts take tokens from; see ``bench.vocabulary``."""

    tokenizer: str | None = None
    vocab_size: int | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """Requests per second (inf: all at once), and how they arrive: gaps are gamma, 1.0 being a Poisson process."""

    num_prompts: int = 1000
    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    num_warmups: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Sampling:
    temperature: float = 0.0
    ignore_eos: bool = False
    extra_body: JsonObject = field(default_factory=dict)
    """Merged into every request, over all else."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is reported. ``goodput`` maps a metric to its limit in ms; a good request keeps all of them."""

    metrics: tuple[str, ...] = ("ttft", "tpot", "itl")
    percentiles: tuple[float, ...] = (99.0,)
    goodput: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Saving:
    folder: Path = Path()
    filename: str | None = None
    detailed: bool = False


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """One run of ``tandem bench serve``. With ``versus``, rounds at the two servers take turns."""

    target: Target
    dataset: Dataset = RandomData()
    tokens: TokenChoice = TokenChoice()
    load: Load = Load()
    sampling: Sampling = Sampling()
    wanted: Wanted = Wanted()
    saving: Saving | None = None
    versus: Target | None = None
    num_rounds: int = 1
    ready_timeout_s: float = 0.0
    """How long to wait for a server that is not up yet."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model of Llama's family."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ties_embeddings: bool = True

    @property
    def num_matrix_weights(self) -> int:
        """Of all layers' matrices: what a token is multiplied with, but for the head."""
        heads = 2 * self.heads + 2 * self.kv_heads
        return self.layers * self.hidden * (heads * self.head_dim + 3 * self.inner)


SHAPES = {
    "11m": Shape(256, 688, 4, 8, 4, 32),
    "0.4b": Shape(896, 4864, 24, 14, 2, 64),
    "1b": Shape(2048, 8192, 16, 32, 8, 64),
    "8b": Shape(4096, 14336, 32, 32, 8, 128, ties_embeddings=False),
}
"""By their size with a vocabulary of 32000 (8b: of 128256, as Llama 3.1's)."""
