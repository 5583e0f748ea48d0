"""POST /v1/chat/completions: a conversation, rendered by the model's chat template."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from proto.request import TokenOut
from router.openai import serving
from router.openai.generation import Delta, Generation
from router.openai.logprobs import chat_logprobs
from router.openai.schema import ChatBody, Conversation, read_chat
from router.openai.serving import Api, Call
from router.sse import event
from router.tokenizer import ServedModel


async def create_chat_completion(api: Api, request: Request) -> Response:
    """The endpoint. Raises TandemError and HTTPException before the response's head is sent."""
    call = Call.of(request)
    async with serving.receiving(api):
        fields, size = await serving.read_fields(request)
        model = serving.find_model(api, fields)
        body = await serving.aside(lambda: read_chat(fields, model, api.settings), size)
        options = body.options
        text = await render(api, model, body.conversation, size)
        (ids,) = await serving.encode_prompts(api, model, [text], options)
    prompt = serving.truncate(ids, options, model)
    new = serving.new_request(prompt, body.params, options, model, call)
    reply = _Reply(api, call, model, body)
    if options.stream:
        return await serving.run_stream(api, call, model, [new], options, reply.frames)
    return await serving.run_whole(api, call, model, [new], reply.whole)


async def render(api: Api, model: ServedModel, conversation: Conversation, size: int) -> str:
    """The conversation as the prompt's text. ``size``: of the body it came in, in bytes. Raises InvalidRequest."""

    def work() -> str:
        return model.templates.render(
            conversation.messages,
            tools=conversation.tools,
            documents=conversation.documents,
            add_generation_prompt=conversation.add_generation_prompt,
            continue_final_message=conversation.continue_final_message,
            variables={**(api.settings.default_chat_template_kwargs or {}), **conversation.variables},
        )

    start = time.perf_counter()
    text = await serving.aside(work, size)
    api.metrics.stage("template", time.perf_counter() - start)
    return text


class _Reply:
    """The JSON of one chat completion, whole or in chunks."""

    def __init__(self, api: Api, call: Call, model: ServedModel, body: ChatBody) -> None:
        self._api = api
        self._call = call
        self._model = model
        self._body = body

    def _head(self, kind: str) -> dict[str, object]:
        return {
            "id": f"chatcmpl-{self._call.label}",
            "object": kind,
            "created": self._call.created,
            "model": self._body.options.model,
            "system_fingerprint": self._api.fingerprint(self._model),
        }

    async def whole(self, generation: Generation) -> Response:
        choices = [self._choice(delta) for delta in await generation.collect()]
        body = {**self._head("chat.completion"), "choices": choices, "usage": serving.usage_of(generation)}
        body["service_tier"] = None
        if self._body.options.return_token_ids:
            body["prompt_token_ids"] = generation.prompts[0]
        if self._call.wants_timings:
            body["timings"] = serving.timings_of(generation)
        return JSONResponse(body, headers=serving.answer_headers(self._body.options, generation, complete=True))

    async def frames(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """A role chunk per choice, content chunks, a last chunk with the reason, perhaps one with the usage."""
        options, head = self._body.options, self._head("chat.completion.chunk")
        seen: set[int] = set()
        while batch := await generation.next():
            for delta in batch:
                chunks = [] if delta.index in seen else [self._role_chunk(delta.index)]
                chunks += self._content_chunks(delta)
                for chunk in chunks:
                    frame: dict[str, object] = {**head, "choices": [chunk]}
                    if options.continuous_usage:
                        frame["usage"] = serving.usage_of(generation)
                    if options.return_token_ids and delta.index not in seen:
                        frame["prompt_token_ids"] = generation.prompts[0]
                    seen.add(delta.index)
                    yield event(frame)
        wants_timings = options.include_timings or self._call.wants_timings
        if options.include_usage or wants_timings:
            last: dict[str, object] = {**head, "choices": [], "usage": serving.usage_of(generation)}
            if wants_timings:
                last["timings"] = serving.timings_of(generation)
            yield event(last)

    def _role_chunk(self, index: int) -> dict[str, object]:
        delta = {"role": self._api.settings.response_role, "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _content_chunks(self, delta: Delta) -> list[dict[str, object]]:
        """What the choice gained; its end is a chunk of its own, as OpenAI sends it."""
        chunks: list[dict[str, object]] = []
        options = self._body.options
        wants_tokens = options.return_token_ids or self._body.params.logprobs is not None
        if delta.text or (wants_tokens and delta.tokens):
            chunk: dict[str, object] = {
                "index": delta.index,
                "delta": {"content": delta.text},
                "logprobs": self._logprobs(delta.tokens),
                "finish_reason": None,
            }
            if options.return_token_ids:
                chunk["token_ids"] = [out.token for out in delta.tokens]
            chunks.append(chunk)
        if delta.finish is not None:
            end = {"index": delta.index, "delta": {}, "logprobs": None, "finish_reason": delta.finish}
            chunks.append({**end, "stop_reason": delta.stop_reason})
        return chunks

    def _choice(self, delta: Delta) -> dict[str, object]:
        message = {
            "role": self._api.settings.response_role,
            "content": delta.text,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": None,
        }
        choice: dict[str, object] = {
            "index": delta.index,
            "message": message,
            "logprobs": self._logprobs(delta.tokens),
            "finish_reason": delta.finish,
            "stop_reason": delta.stop_reason,
        }
        if self._body.options.return_token_ids:
            choice["token_ids"] = [out.token for out in delta.tokens]
        return choice

    def _logprobs(self, tokens: list[TokenOut]) -> dict[str, object] | None:
        if self._body.params.logprobs is None:
            return None
        return chat_logprobs(self._model, tokens, as_ids=self._body.options.tokens_as_ids)
