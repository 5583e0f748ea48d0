"""What the HTTP side asks of the routing side, and nothing else of it.

    HTTP, text, templates  ──NewRequest──▶  FlowLike.start  ──▶  RequestStreamLike  ──list[TokenOut]──▶  text, JSON, SSE

The HTTP side (``app``, ``openai``) knows text and no workers; the routing side (``flow``, ``recovery``, ``registry``)
knows workers and no text. They meet in these types.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from proto.errors import TandemError
from proto.ids import RequestId, WorkerId
from proto.lifecycle import Stage
from proto.request import SamplingParams, TokenOut

if TYPE_CHECKING:
    from router.tokenizer import ServedModel

StageTimes = Mapping[Stage, float]
"""Seconds that a request has spent in each stage it has left, over all its tries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequest:
    """A request as the HTTP side hands it over.

    ``prompt`` is not empty, and every id is within the vocabulary. ``params`` is checked; ``max_tokens`` is a number
    and fits the context beside the prompt; ``seed`` may be None: the flow draws one. ``label`` is the client's
    X-Request-ID or ours: for logs and traces only, never an identity. ``layout`` is the KV layout of the model whose
    tokens these are (empty: of the one served when it starts): workers of another one never see them. ``spent_s`` is
    what of its time it took to receive and read it.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    cache_salt: str = ""
    priority: int = 0
    label: str = ""
    layout: str = ""
    spent_s: float = 0.0
    is_later: bool = False
    """Other prompts of its HTTP request have started: where every queue is full, it waits for its turn."""


class RequestStreamLike(Protocol):
    """One accepted request's tokens. Whoever got it calls ``aclose`` exactly when done with it, also after an error."""

    @property
    def id(self) -> RequestId: ...

    @property
    def timings(self) -> StageTimes: ...

    @property
    def num_cached(self) -> int:
        """Prompt tokens that came from a prefix cache, as far as known by now."""

    @property
    def num_bytes_moved(self) -> int:
        """Payload bytes of the hand-offs so far."""

    @property
    def prefill_worker(self) -> WorkerId | None:
        """Who computed the prompt, last; None while unknown."""

    @property
    def decode_worker(self) -> WorkerId | None: ...

    def __aiter__(self) -> AsyncIterator[list[TokenOut]]: ...

    async def __anext__(self) -> list[TokenOut]:
        """The next tokens, at least one: every (choice, position) exactly once, and in order within a choice.

        Raises StopAsyncIteration once every choice is finished or stopped, and TandemError when the request failed or
        its client reads too slowly.
        """

    def stop_choice(self, choice: int) -> None:
        """No more of this choice is wanted (a stop string matched). Its later tokens are dropped. Idempotent."""

    def fail(self, error: TandemError) -> None:
        """Ends the request because of ``error``, which another part of the same answer met: no client left. Idempotent.

        ``aclose`` is called all the same.
        """

    async def aclose(self) -> None:
        """Ends the request: whatever is unfinished is aborted and freed on every worker. Idempotent."""


class FlowLike(Protocol):
    async def start(self, new: NewRequest) -> RequestStreamLike:
        """Admits and routes the request. Raises Overloaded, NoWorker or another TandemError; then nothing is left."""


class ModelProvider(Protocol):
    def current(self) -> ServedModel:
        """The model that the live workers serve. Raises NoWorker while none was ever seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """Whether requests can be served now. ``reasons`` say why not, or what is degraded; /ready shows ``details``."""

    ready: bool
    reasons: tuple[str, ...] = ()
    details: Mapping[str, int | float | str | bool] = field(default_factory=dict)


class MetricsLike(Protocol):
    """What the HTTP side reports, and where /metrics reads."""

    def exposition(self) -> tuple[bytes, str]:
        """Every metric of the process as (body, content type) in Prometheus' text format."""

    def http_request(self, handler: str, method: str, status: int, seconds: float) -> None:
        """One HTTP request was answered to its end. ``handler`` is the route, not the path."""

    def stage(self, name: str, seconds: float) -> None:
        """Time spent on this side of the contract: ``template``, ``tokenize`` or ``detokenize``."""
