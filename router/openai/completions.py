"""POST /v1/completions: prompts as text or token ids, several at once, with n choices each."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from proto.request import TokenOut
from router.contract import NewRequest
from router.openai import serving
from router.openai.generation import Delta, Generation
from router.openai.logprobs import completion_logprobs, text_length
from router.openai.schema import CompletionBody, read_completion
from router.openai.serving import Api, Call
from router.sse import Frames, SseResponse, event
from router.tokenizer import ServedModel


async def create_completion(api: Api, request: Request) -> Response:
    """The endpoint. Raises TandemError and HTTPException before the response's head is sent."""
    call = Call.of(request)
    async with serving.receiving(api):
        fields, size = await serving.read_fields(request)
        model = serving.find_model(api, fields)
        body = await serving.aside(lambda: read_completion(fields, model, api.settings), size)
        prompts = await _encode(api, model, body)
        requests = await serving.aside(
            lambda: [serving.new_request(prompt, body.params, body.options, model, call) for prompt in prompts], size
        )
    reply = _Reply(api, call, model, body, requests)
    if body.echo_only:
        return await reply.echo()
    if body.options.stream:
        return await serving.run_stream(api, call, model, requests, body.options, reply.frames)
    return await serving.run_whole(api, call, model, requests, reply.whole)


async def _encode(api: Api, model: ServedModel, body: CompletionBody) -> list[tuple[int, ...]]:
    texts = [prompt for prompt in body.prompts if isinstance(prompt, str)]
    encoded = iter(await serving.encode_prompts(api, model, texts, body.options))
    prompts = [next(encoded) if isinstance(prompt, str) else prompt for prompt in body.prompts]
    return [serving.truncate(prompt, body.options, model) for prompt in prompts]


class _Reply:
    """The JSON of one completion, whole or in chunks."""

    def __init__(
        self, api: Api, call: Call, model: ServedModel, body: CompletionBody, requests: Sequence[NewRequest]
    ) -> None:
        self._api = api
        self._call = call
        self._model = model
        self._body = body
        self._requests = requests
        self._head = {
            "id": f"cmpl-{call.label}",
            "object": "text_completion",
            "created": call.created,
            "model": body.options.model,
            "system_fingerprint": api.fingerprint(model),
        }

    async def whole(self, generation: Generation) -> Response:
        choices = [self._choice(delta) for delta in await generation.collect()]
        body = {**self._head, "choices": choices, "usage": serving.usage_of(generation)}
        if self._call.wants_timings:
            body["timings"] = serving.timings_of(generation)
        return JSONResponse(body, headers=serving.answer_headers(self._body.options, generation, complete=True))

    async def frames(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """Chunks as choices gain text, each choice's last with its reason, and perhaps one with the usage."""
        options = self._body.options
        offsets: dict[int, int] = {}
        while batch := await generation.next():
            for delta in batch:
                chunk = self._chunk(delta, offsets)
                if chunk is None:
                    continue
                frame: dict[str, object] = {**self._head, "choices": [chunk]}
                if options.continuous_usage:
                    frame["usage"] = serving.usage_of(generation)
                yield event(frame)
        wants_timings = options.include_timings or self._call.wants_timings
        if options.include_usage or wants_timings:
            last: dict[str, object] = {**self._head, "choices": [], "usage": serving.usage_of(generation)}
            if wants_timings:
                last["timings"] = serving.timings_of(generation)
            yield event(last)

    def _chunk(self, delta: Delta, offsets: dict[int, int]) -> dict[str, object] | None:
        """One choice's chunk, or None when there is nothing to tell. ``offsets`` holds the choices seen so far."""
        options, is_first = self._body.options, delta.index not in offsets
        offset = offsets.setdefault(delta.index, 0)
        text = self._echoed(delta.index) + delta.text if is_first else delta.text
        wants_tokens = options.return_token_ids or self._wants_logprobs
        if not text and delta.finish is None and not wants_tokens:
            return None
        chunk: dict[str, object] = {
            "index": delta.index,
            "text": text,
            "logprobs": self._logprobs(delta.tokens, offset),
            "finish_reason": delta.finish,
            "stop_reason": delta.stop_reason,
        }
        if self._wants_logprobs:
            offsets[delta.index] += text_length(self._model, delta.tokens, as_ids=options.tokens_as_ids)
        if options.return_token_ids:
            chunk["token_ids"] = [out.token for out in delta.tokens]
            if is_first:
                chunk["prompt_token_ids"] = self._prompt(delta.index)
        return chunk

    def _choice(self, delta: Delta) -> dict[str, object]:
        choice: dict[str, object] = {
            "index": delta.index,
            "text": self._echoed(delta.index) + delta.text,
            "logprobs": self._logprobs(delta.tokens, 0),
            "finish_reason": delta.finish,
            "stop_reason": delta.stop_reason,
        }
        if self._body.options.return_token_ids:
            choice["token_ids"] = [out.token for out in delta.tokens]
            choice["prompt_token_ids"] = self._prompt(delta.index)
        return choice

    @property
    def _wants_logprobs(self) -> bool:
        return self._body.params.logprobs is not None

    def _logprobs(self, tokens: list[TokenOut], offset: int) -> dict[str, object] | None:
        if not self._wants_logprobs:
            return None
        return completion_logprobs(self._model, tokens, as_ids=self._body.options.tokens_as_ids, offset=offset)

    def _prompt(self, index: int) -> tuple[int, ...]:
        return self._requests[index // self._body.params.n].prompt

    def _echoed(self, index: int) -> str:
        """The prompt's text, if it is to come first: as it was sent, unless it came as ids or was cut."""
        if not self._body.echo:
            return ""
        given = self._body.prompts[index // self._body.params.n]
        if isinstance(given, str) and self._body.options.truncate_prompt is None:
            return given
        return self._model.decode(self._prompt(index), skip_special_tokens=self._body.params.skip_special_tokens)

    async def echo(self) -> Response:
        """The prompts and nothing else: no worker is asked."""
        n, options = self._body.params.n, self._body.options
        deltas = [Delta(i, finish="length") for i in range(len(self._requests) * n)]
        num_prompt = sum(len(new.prompt) for new in self._requests)
        usage = {
            "prompt_tokens": num_prompt,
            "total_tokens": num_prompt,
            "completion_tokens": 0,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        headers = serving.answer_headers(options, None, complete=True)
        if not options.stream:
            choices = [{**self._choice(delta), "logprobs": None} for delta in deltas]
            return JSONResponse({**self._head, "choices": choices, "usage": usage}, headers=headers)

        async def frames() -> AsyncGenerator[bytes, None]:
            for delta in deltas:
                yield event({**self._head, "choices": [self._choice(delta)]})
            if options.include_usage:
                yield event({**self._head, "choices": [], "usage": usage})

        async def end() -> None:
            pass

        source = Frames(frames())
        return SseResponse(await source.next(), source, headers=headers, on_error=lambda error: b"", on_end=end)
