"""What the two generation endpoints share: reading the body, preparing prompts, starting, answering.

Knows HTTP and the routing contract; knows no field of either endpoint's JSON but usage and timings.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from proto.errors import InvalidRequest, ModelNotFound
from proto.request import SamplingParams
from proto.settings import RouterSettings
from router.contract import FlowLike, MetricsLike, ModelProvider, NewRequest
from router.openai.errors import reply_for
from router.openai.generation import Generation
from router.openai.schema import Options
from router.sse import Frames, SseResponse, until_gone
from router.tokenizer import ServedModel
from router.validate import Fields, parse_object, room_for_output, too_long

T = TypeVar("T")

MAX_BODY_BYTES = 32 << 20
_MUCH = 16_384
"""Characters, bytes or tokens above which work on them would hold up the event loop noticeably."""
_MOST_CHARACTERS_PER_TOKEN = 8
"""Hardly any text has more on average: a text longer than this is suspected not to fit the context."""
_TOKENS_AT_A_CUT = 64
"""How many more tokens a text's beginning may give than its share of the whole: a cut word is more pieces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """What every endpoint needs."""

    settings: RouterSettings
    flow: FlowLike
    models: ModelProvider
    metrics: MetricsLike
    version: str

    def fingerprint(self, model: ServedModel) -> str:
        """Names what decides an answer, besides the request: this version and the model's weights."""
        return f"tandem-{self.version}-{model.card.digest[:8]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One HTTP request that generates: who asked, under which label, and since when (``arrived``: monotonic)."""

    request: Request
    label: str
    created: int
    arrived: float
    wants_timings: bool

    @classmethod
    def of(cls, request: Request) -> Call:
        wants_timings = request.headers.get("x-tandem-timings") == "1"
        return cls(
            request=request,
            label=label_of(request),
            created=int(time.time()),
            arrived=time.monotonic(),
            wants_timings=wants_timings,
        )


def label_of(request: Request) -> str:
    """The request's X-Request-ID, or the one it was given."""
    return str(request.state.label)


@asynccontextmanager
async def receiving(api: Api) -> AsyncIterator[None]:
    """RECEIVED, whose limit is the request's own: a body that does not come, or takes for ever to become tokens, is
    given up. Raises HTTPException 408."""
    try:
        async with asyncio.timeout(api.settings.request_timeout):
            yield
    except TimeoutError:
        message = f"The request was not received and read within {api.settings.request_timeout:g} s."
        # Who has not sent all of one request cannot send another on this connection.
        raise HTTPException(408, message, {"connection": "close"}) from None


async def read_fields(request: Request) -> tuple[Fields, int]:
    """The body as a JSON object, and its size in bytes. Raises InvalidRequest, and HTTPException 413."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise InvalidRequest("Unsupported Media Type: Only 'application/json' is allowed (header Content-Type).")
    too_large = HTTPException(413, f"The request body is larger than {MAX_BODY_BYTES} bytes.")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise too_large
    return Fields(parse_object(bytes(body))), len(body)


def find_model(api: Api, fields: Fields) -> ServedModel:
    """The model that the body names, or the one there is. Raises ModelNotFound, NoWorker."""
    model, name = api.models.current(), fields.text("model")
    if name and name not in model.names:
        known = ", ".join(model.names)
        shown = name[:200]
        raise ModelNotFound(f"The model `{shown}` does not exist. This server serves: {known}.", param="model")
    return model


async def aside(work: Callable[[], T], size: int) -> T:
    """The result of ``work`` on ``size`` characters, bytes or tokens: where those are many, a thread's."""
    return await asyncio.to_thread(work) if size > _MUCH else work()


async def encode(api: Api, model: ServedModel, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
    """``text`` as ids. Raises InvalidRequest."""
    start = time.perf_counter()
    ids = await aside(lambda: model.encode(text, add_special_tokens=add_special_tokens), len(text))
    api.metrics.stage("tokenize", time.perf_counter() - start)
    return tuple(ids)


async def encode_prompts(api: Api, model: ServedModel, texts: Sequence[str], options: Options) -> list[tuple[int, ...]]:
    """Prompts' texts as ids, all in one go. Raises InvalidRequest, also for one far too long for the context."""
    if not texts:
        return []
    start = time.perf_counter()
    prompts = await aside(
        lambda: [_encode_prompt(model, text, options) for text in texts], sum(len(text) for text in texts)
    )
    api.metrics.stage("tokenize", time.perf_counter() - start)
    return prompts


def _encode_prompt(model: ServedModel, text: str, options: Options) -> tuple[int, ...]:
    """One that is far too long is told by its beginning: to encode megabytes only to refuse them would take seconds."""
    longest = max(_MUCH, _MOST_CHARACTERS_PER_TOKEN * model.max_model_len)
    if options.truncate_prompt is None and len(text) > longest:
        beginning = model.encode(text[:longest], add_special_tokens=options.add_special_tokens)
        if len(beginning) > model.max_model_len + _TOKENS_AT_A_CUT:
            raise too_long(len(beginning), model.max_model_len, is_all=False)
    return tuple(model.encode(text, add_special_tokens=options.add_special_tokens))


def truncate(prompt: tuple[int, ...], options: Options, model: ServedModel) -> tuple[int, ...]:
    """``prompt`` within truncate_prompt_tokens."""
    keep = options.truncate_prompt
    if keep == -1:
        keep = max(model.max_model_len - (options.max_tokens or options.default_max_tokens or 1), 1)
    if keep is None or len(prompt) <= keep:
        return prompt
    return prompt[-keep:] if options.truncate_left else prompt[:keep]


def new_request(
    prompt: tuple[int, ...], params: SamplingParams, options: Options, model: ServedModel, call: Call
) -> NewRequest:
    """What the flow is asked for. Raises InvalidRequest for an empty prompt, or one too long for the context."""
    if not prompt:
        raise InvalidRequest("The prompt is empty: it has no token.", param="prompt")
    if (highest := max(prompt)) >= model.vocab_size:
        raise InvalidRequest(f"Token id {highest} is outside the vocabulary of {model.vocab_size}.", param="prompt")
    max_tokens = room_for_output(len(prompt), options.max_tokens, options.default_max_tokens, model.max_model_len)
    if params.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens ({params.min_tokens}) must not exceed max_tokens ({max_tokens}).", param="min_tokens"
        )
    return NewRequest(
        prompt=prompt,
        params=dataclasses.replace(params, max_tokens=max_tokens),
        cache_salt=options.cache_salt,
        priority=options.priority,
        label=call.label,
        layout=model.card.layout,
        spent_s=time.monotonic() - call.arrived,
    )


def usage_of(generation: Generation) -> dict[str, object]:
    usage = generation.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "completion_tokens": usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def timings_of(generation: Generation) -> dict[str, object]:
    """Where the time went, and who worked, for clients that asked."""
    prefill, decode = generation.workers
    return {
        "ttft_ms": _ms(generation.first_token_s or 0.0),
        "total_ms": _ms(generation.total_s),
        "stages_ms": {stage: _ms(seconds) for stage, seconds in generation.stage_times().items()},
        "kv_bytes_moved": generation.num_bytes_moved,
        "prefill_workers": prefill,
        "decode_workers": decode,
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def answer_headers(options: Options, generation: Generation | None, *, complete: bool) -> dict[str, str]:
    """Headers beside the answer. ``complete``: it is all there, so the timings are final."""
    headers: dict[str, str] = {}
    if options.ignored:
        headers["x-tandem-ignored"] = ", ".join(options.ignored)
    if generation is None:
        return headers
    for name, workers in zip(("x-tandem-prefill", "x-tandem-decode"), generation.workers, strict=True):
        if workers:
            headers[name] = ", ".join(workers)
    if complete:
        stages = {**generation.stage_times(), "ttft": generation.first_token_s or 0.0, "total": generation.total_s}
        headers["server-timing"] = ", ".join(f"{name};dur={_ms(seconds)}" for name, seconds in stages.items())
    return headers


async def run_whole(
    api: Api,
    call: Call,
    model: ServedModel,
    requests: Sequence[NewRequest],
    shape: Callable[[Generation], Coroutine[object, object, Response]],
) -> Response:
    """Runs the requests to their end and lets ``shape`` make the response. Aborted when the client leaves."""

    async def work() -> Response:
        generation = await Generation.start(api.flow, model, requests)
        try:
            return await shape(generation)
        finally:
            await _end(api, generation)

    return await until_gone(call.request.receive, work())


async def run_stream(
    api: Api,
    call: Call,
    model: ServedModel,
    requests: Sequence[NewRequest],
    options: Options,
    make_frames: Callable[[Generation], AsyncGenerator[bytes, None]],
) -> Response:
    """Starts the requests and answers with their frames.

    The response's head waits for the first frame, so what fails before it becomes a status of its own. With keep-alive
    comments it waits for one interval at most: a client that must hear something hears it.
    """

    async def begin() -> Response:
        generation = await Generation.start(api.flow, model, requests)
        frames = Frames(make_frames(generation), api.settings.sse_keep_alive_interval)
        try:
            return SseResponse(
                await frames.next(),
                frames,
                headers=answer_headers(options, generation, complete=False),
                on_error=lambda error: f"data: {reply_for(error, call.label).body}\n\n".encode(),
                on_end=lambda: _end(api, generation),
            )
        except BaseException:
            await frames.aclose()
            await _end(api, generation)
            raise

    return await until_gone(call.request.receive, begin())


async def _end(api: Api, generation: Generation) -> None:
    api.metrics.stage("detokenize", generation.detokenize_s)
    await generation.aclose()
