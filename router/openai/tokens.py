"""POST /tokenize and /detokenize: what a prompt becomes, without generating."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from proto.errors import InvalidRequest
from router.openai import chat, serving
from router.openai.schema import read_conversation
from router.openai.serving import Api
from router.validate import check_token_ids


async def tokenize(api: Api, request: Request) -> Response:
    """Takes ``prompt`` or ``messages``. Raises InvalidRequest, ModelNotFound, NoWorker."""
    async with serving.receiving(api):
        fields, size = await serving.read_fields(request)
    model = serving.find_model(api, fields)
    prompt = fields.text("prompt")
    if (prompt is None) == (fields.raw("messages") is None):
        raise InvalidRequest("Send either prompt or messages.", param="prompt")
    add_special_tokens = fields.flag("add_special_tokens", prompt is not None)
    wants_strings = fields.flag("return_token_strs")
    conversation = read_conversation(fields) if prompt is None else None
    fields.finish()
    text = prompt or "" if conversation is None else await chat.render(api, model, conversation, size)
    ids = await serving.encode(api, model, text, add_special_tokens=add_special_tokens)
    wanted = ids if wants_strings else ()
    strings = await serving.aside(lambda: [model.token_text(token) for token in wanted], len(wanted))
    return JSONResponse(
        {
            "count": len(ids),
            "max_model_len": model.max_model_len,
            "tokens": ids,
            "token_strs": strings if wants_strings else None,
        }
    )


async def detokenize(api: Api, request: Request) -> Response:
    """Takes ``tokens``. Raises InvalidRequest, ModelNotFound, NoWorker."""
    async with serving.receiving(api):
        fields, _ = await serving.read_fields(request)
    model = serving.find_model(api, fields)
    values = fields.array("tokens")
    fields.finish()
    if values is None:
        raise InvalidRequest("tokens must be an array of token ids.", param="tokens")

    def work() -> str:
        return model.decode(check_token_ids(values, model.vocab_size, "tokens"), skip_special_tokens=False)

    return JSONResponse({"prompt": await serving.aside(work, len(values))})
