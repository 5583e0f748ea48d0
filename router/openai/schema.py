"""The two generation requests as typed values, read from JSON by ``Fields``. Knows the API's fields; no tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from proto.errors import InvalidRequest
from proto.request import SamplingParams
from proto.settings import RouterSettings
from router.tokenizer import ServedModel
from router.validate import Fields, check_token_ids, read_sampling, wrong_type
from router.values import Json, JsonObject

MAX_PROMPTS = 1024
MAX_SALT = 128
MAX_PRIORITY = (1 << 63) - 1
"""It has 64 bits on the wire."""
_COMPLETION_MAX_TOKENS = 16
_TEMPLATE_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What both endpoints take besides sampling.

    ``model`` is the name the client used: the answer bears it. ``include_usage``: in a chunk of its own at the stream's
    end; ``continuous_usage``: in every other chunk. ``max_tokens`` is None where the client named none;
    then ``default_max_tokens`` counts, or with None all the room.
    ``truncate_prompt``: keep that many prompt tokens at most; -1: as many as leave room for the output.
    """

    model: str
    max_tokens: int | None
    default_max_tokens: int | None
    stream: bool
    include_usage: bool
    continuous_usage: bool
    include_timings: bool
    return_token_ids: bool
    tokens_as_ids: bool
    add_special_tokens: bool
    truncate_prompt: int | None
    truncate_left: bool
    cache_salt: str
    priority: int
    ignored: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionBody:
    """``prompts`` are texts or token ids. ``params.max_tokens`` is not decided yet (see ``Options``)."""

    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool
    echo_only: bool
    params: SamplingParams
    options: Options


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What a chat template is given."""

    messages: tuple[JsonObject, ...]
    tools: list[Json] | None
    documents: list[Json] | None
    add_generation_prompt: bool
    continue_final_message: bool
    variables: JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatBody:
    conversation: Conversation
    params: SamplingParams
    options: Options


def read_completion(fields: Fields, model: ServedModel, settings: RouterSettings) -> CompletionBody:
    """Raises InvalidRequest."""
    prompts = _read_prompts(fields, model.vocab_size)
    echo, max_tokens, logprobs = fields.flag("echo"), fields.whole("max_tokens"), fields.whole("logprobs")
    echo_only = echo and max_tokens == 0
    if echo and logprobs is not None:
        raise InvalidRequest(
            "echo with logprobs needs the log probabilities of the prompt, which are not offered. Send one of the two.",
            param="echo",
        )
    params = read_sampling(
        fields,
        model,
        max_tokens=None if echo_only else max_tokens,
        logprobs=logprobs,
        max_logprobs=settings.max_logprobs,
    )
    if fields.text("suffix"):
        raise InvalidRequest("suffix (text to insert before) is not offered by this model.", param="suffix")
    _check_best_of(fields, params.n)
    _check_response_format(fields)
    options = _read_options(fields, model, max_tokens, _COMPLETION_MAX_TOKENS, add_special_tokens=True)
    return CompletionBody(prompts=prompts, echo=echo, echo_only=echo_only, params=params, options=options)


def read_chat(fields: Fields, model: ServedModel, settings: RouterSettings) -> ChatBody:
    """Raises InvalidRequest."""
    limit, old_limit = fields.whole("max_completion_tokens"), fields.whole("max_tokens")
    if limit is not None and limit < 1:
        raise InvalidRequest(f"max_completion_tokens must be at least 1, got {limit}.", param="max_completion_tokens")
    max_tokens = old_limit if limit is None else limit
    wants_logprobs, top_logprobs = fields.flag("logprobs"), fields.whole("top_logprobs") or 0
    if top_logprobs and not wants_logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true.", param="top_logprobs")
    if not 0 <= top_logprobs <= settings.max_logprobs:
        raise InvalidRequest(
            f"top_logprobs must be between 0 and {settings.max_logprobs}, got {top_logprobs}.", param="top_logprobs"
        )
    params = read_sampling(
        fields,
        model,
        max_tokens=max_tokens,
        logprobs=top_logprobs if wants_logprobs else None,
        max_logprobs=settings.max_logprobs,
    )
    _check_best_of(fields, params.n)
    _check_response_format(fields)
    _check_modalities(fields)
    if fields.flag("echo"):
        raise InvalidRequest("echo is not offered for chat.", param="echo")
    conversation = read_conversation(fields)
    _check_tool_choice(fields, conversation.tools)
    options = _read_options(fields, model, max_tokens, None, add_special_tokens=False)
    return ChatBody(conversation=conversation, params=params, options=options)


def read_conversation(fields: Fields) -> Conversation:
    """The fields that a chat template sees. Raises InvalidRequest."""
    messages = fields.array("messages")
    if not messages:
        raise InvalidRequest("messages must be an array with at least one message.", param="messages")
    continue_final = fields.flag("continue_final_message")
    add_prompt = fields.flag("add_generation_prompt", not continue_final)
    if continue_final and add_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude each other.", param="continue_final_message"
        )
    variables = fields.mapping("chat_template_kwargs") or {}
    if reserved := sorted(_TEMPLATE_VARIABLES & variables.keys()):
        raise InvalidRequest(
            f"chat_template_kwargs must not hold {reserved[0]!r}: it has a field of its own.",
            param="chat_template_kwargs",
        )
    return Conversation(
        messages=tuple(_read_message(message, i) for i, message in enumerate(messages)),
        tools=_read_tools(fields),
        documents=fields.array("documents"),
        add_generation_prompt=add_prompt,
        continue_final_message=continue_final,
        variables=variables,
    )


def _read_options(
    fields: Fields,
    model: ServedModel,
    max_tokens: int | None,
    default_max_tokens: int | None,
    *,
    add_special_tokens: bool,
) -> Options:
    stream = fields.flag("stream")
    about_stream = fields.object("stream_options") or Fields({})
    if fields.raw("stream_options") and not stream:
        raise InvalidRequest("stream_options needs stream to be true.", param="stream_options")
    continuous = about_stream.flag("continuous_usage_stats")
    include_usage = about_stream.flag("include_usage")
    include_timings = about_stream.flag("include_timings")
    if about_stream.flag("include_obfuscation"):
        fields.ignored.append("stream_options.include_obfuscation")
    about_stream.finish()
    side = fields.text("truncation_side")
    if side not in (None, "left", "right"):
        raise InvalidRequest("truncation_side must be 'left' or 'right'.", param="truncation_side")
    truncate = fields.whole("truncate_prompt_tokens")
    if truncate is not None and (truncate == 0 or truncate < -1):
        raise InvalidRequest("truncate_prompt_tokens must be -1, or 1 or more.", param="truncate_prompt_tokens")
    options = Options(
        model=fields.text("model") or model.name,
        max_tokens=max_tokens,
        default_max_tokens=default_max_tokens,
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous,
        include_timings=include_timings,
        return_token_ids=fields.flag("return_token_ids"),
        tokens_as_ids=fields.flag("return_tokens_as_token_ids"),
        add_special_tokens=fields.flag("add_special_tokens", add_special_tokens),
        truncate_prompt=truncate,
        truncate_left=side != "right",
        cache_salt=_read_salt(fields),
        priority=_read_priority(fields),
        ignored=(),
    )
    fields.finish()
    return replace(options, ignored=tuple(fields.ignored))


def _read_salt(fields: Fields) -> str:
    salt = fields.text("cache_salt")
    if salt is not None and not 0 < len(salt) <= MAX_SALT:
        raise InvalidRequest(f"cache_salt must have 1 to {MAX_SALT} characters.", param="cache_salt")
    return salt or ""


def _read_priority(fields: Fields) -> int:
    priority = fields.whole("priority") or 0
    if not -MAX_PRIORITY - 1 <= priority <= MAX_PRIORITY:
        raise InvalidRequest(f"priority must be between {-MAX_PRIORITY - 1} and {MAX_PRIORITY}.", param="priority")
    return priority


def _read_prompts(fields: Fields, vocab_size: int) -> tuple[str | tuple[int, ...], ...]:
    """The four forms of ``prompt``, as a list of prompts."""
    value = fields.raw("prompt")
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise wrong_type("prompt", "a string, an array of token ids, or an array of either", value)
    if not value:
        raise InvalidRequest("prompt must not be empty.", param="prompt")
    if isinstance(value[0], int):
        return (check_token_ids(value, vocab_size, "prompt"),)
    if len(value) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt takes at most {MAX_PROMPTS} prompts, got {len(value)}.", param="prompt")
    return tuple(_read_prompt(entry, vocab_size) for entry in value)


def _read_prompt(entry: Json, vocab_size: int) -> str | tuple[int, ...]:
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, list):
        raise wrong_type("prompt", "an array of strings or of arrays of token ids", entry)
    if not entry:
        raise InvalidRequest("prompt must not be empty.", param="prompt")
    return check_token_ids(entry, vocab_size, "prompt")


def _read_message(value: Json, index: int) -> JsonObject:
    """A message with its text flattened and its nulls dropped, but for a content of null: what becomes of that, and of
    a tool call's arguments, is the template's matter."""
    where = f"messages[{index}]"
    if not isinstance(value, dict):
        raise wrong_type(where, "an object", value)
    role = value.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{where}.role must be a non-empty string.", param=f"{where}.role")
    message: JsonObject = {name: entry for name, entry in value.items() if entry is not None}
    message["content"] = _flatten(value.get("content"), f"{where}.content")
    if "tool_calls" in message:
        _check_tool_calls(message["tool_calls"], f"{where}.tool_calls")
        if not message["tool_calls"]:
            del message["tool_calls"]
    elif role != "assistant" and "content" not in value:
        raise InvalidRequest(f"{where} has no content.", param=f"{where}.content")
    return message


def _flatten(content: Json, where: str) -> str | None:
    """A content's text: a string as it is, text parts joined by newlines."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong_type(where, "a string or an array of parts", content)
    texts: list[str] = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if not isinstance(part, dict) or not isinstance(kind, str):
            raise wrong_type(where, "an array of typed parts", part)
        if kind not in _TEXT_PARTS:
            raise InvalidRequest(f"Content of type {kind!r} is not offered: this server takes text only.", param=where)
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise InvalidRequest(f"{where}: a part of type {kind!r} needs its text.", param=where)
        texts.append(text)
    return "\n".join(texts)


def _check_tool_calls(calls: Json, where: str) -> None:
    if not isinstance(calls, list):
        raise wrong_type(where, "an array", calls)
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
            raise InvalidRequest(f"{where}: every call needs a function.", param=where)


def _read_tools(fields: Fields) -> list[Json] | None:
    tools = fields.array("tools")
    if tools is not None and not tools:
        raise InvalidRequest("tools must not be an empty array.", param="tools")
    for i, tool in enumerate(tools or ()):
        if not isinstance(tool, dict):
            raise wrong_type(f"tools[{i}]", "an object", tool)
    return tools


def _check_tool_choice(fields: Fields, tools: list[Json] | None) -> None:
    """Tools are shown to the template; calls cannot be parsed, so a client must say that it wants none."""
    choice = fields.raw("tool_choice")
    if choice not in (None, "none") and (tools or choice != "auto"):
        raise InvalidRequest("Tool calls are not offered yet: tool_choice must be 'none'.", param="tool_choice")
    if tools and choice is None:
        raise InvalidRequest(
            "Tool calls are not offered yet. With tool_choice 'none' the tools are shown to the model, and it answers "
            "in text.",
            param="tools",
        )


def _check_best_of(fields: Fields, n: int) -> None:
    best_of = fields.whole("best_of")
    if best_of is not None and best_of != n:
        raise InvalidRequest(f"best_of ({best_of}) other than n ({n}) is not offered.", param="best_of")


def _check_response_format(fields: Fields) -> None:
    form = fields.mapping("response_format")
    if form is None:
        return
    kind = form.get("type")
    if kind in ("json_object", "json_schema", "structural_tag"):
        raise InvalidRequest(
            f"response_format {kind!r} is not offered: this server cannot constrain its output yet, and will not "
            "pretend to.",
            param="response_format",
        )
    if kind != "text":
        raise InvalidRequest("response_format.type must be 'text'.", param="response_format")


def _check_modalities(fields: Fields) -> None:
    modalities = fields.array("modalities")
    if modalities is not None and modalities != ["text"]:
        raise InvalidRequest("modalities must be ['text']: this server makes text only.", param="modalities")
