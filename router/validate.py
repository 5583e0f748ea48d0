"""From a request's JSON to checked values, with errors that name the field. Knows OpenAI's and vLLM's field names;
knows nothing of HTTP, and of the model only its limits.

Every field is either honoured, named in ``Fields.ignored`` (harmless hints), or refused: none is dropped silently.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from typing import NoReturn

from proto.errors import InvalidRequest
from proto.request import SamplingParams
from router.tokenizer import ServedModel
from router.values import Json, JsonObject

MAX_STOP_STRINGS = 16
_MAX_STOP_LENGTH = 1024
_MAX_SHOWN = 80
_HUGE = 1 << 64

HINTS = frozenset(
    {
        "user", "metadata", "store", "service_tier", "parallel_tool_calls", "reasoning_effort", "verbosity",
        "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "prediction", "session_id",
        "include_reasoning", "request_id", "spaces_between_special_tokens",
    }
)  # fmt: skip
"""Fields that ask for nothing a client could miss: accepted, and named in the response's header."""

_CONSTRAINTS = "This server cannot constrain its output yet, and will not pretend to."

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
            "guided_decoding_backend", "guided_whitespace_pattern", "regex", "ebnf", "grammar", "json_schema",
            "structural_tag",
        ),
        _CONSTRAINTS,
    ),
    "functions": "The functions field was replaced by tools, and tool calls are not offered here.",
    "function_call": "The function_call field was replaced by tool_choice, and tool calls are not offered here.",
    "use_beam_search": "Beam search is not offered.",
    "length_penalty": "length_penalty belongs to beam search, which is not offered.",
    "early_stopping": "early_stopping belongs to beam search, which is not offered.",
    "prompt_logprobs": "Log probabilities of the prompt are not offered.",
    "prompt_embeds": "Prompts are text or token ids, not embeddings.",
    "logprob_token_ids": "Log probabilities of chosen tokens are not offered; logprobs gives the most likely ones.",
    "bad_words": "bad_words is not offered; logit_bias with -100 forbids single tokens.",
    "logits_processors": "Logits processors are not offered.",
    "custom_logit_processor": "Logits processors are not offered.",
    "chat_template": "The chat template is the operator's choice (--chat-template); requests cannot bring one.",
    "audio": "Audio output is not offered.",
    "web_search_options": "Web search is not offered.",
    "mm_processor_kwargs": "This server takes text only.",
    "media_io_kwargs": "This server takes text only.",
    "kv_transfer_params": "Hand-offs are arranged by the router, not by clients.",
    "ec_transfer_params": "Hand-offs are arranged by the router, not by clients.",
    "vllm_xargs": "Extra engine arguments are not offered.",
    "watermarking": "Watermarks are not offered.",
    "repetition_detection": "Repetition detection is not offered; repetition_penalty is.",
    "thinking_token_budget": "Thinking budgets are not offered.",
    "stop_regex": "Stop expressions are not offered; stop takes strings.",
    "lora_path": "Adapters are not offered.",
}  # fmt: skip
"""Fields that would change the answer and cannot be honoured: refused unless they ask for nothing."""


def parse_object(raw: bytes) -> JsonObject:
    """The JSON object in a request's body. Raises InvalidRequest."""
    try:
        value = json.loads(raw, parse_constant=_refuse_constant)
    except RecursionError:
        raise InvalidRequest("The request body is nested too deeply.") from None
    except ValueError as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"The request body must be a JSON object, not {_kind(value)}.")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


class Fields:
    """One JSON object, read field by field. A null counts as absent, as OpenAI's clients mean it.

    ``path`` comes before field names in errors. Every reader raises InvalidRequest for a value of the wrong type.
    """

    def __init__(self, values: JsonObject, path: str = "") -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self._path = path
        self._read: set[str] = set()
        self.ignored: list[str] = []

    def raw(self, name: str) -> Json:
        self._read.add(name)
        return self._values.get(name)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.raw(name)
        if value is None:
            return default
        return value if isinstance(value, bool) else self._wrong(name, "true or false", value)

    def whole(self, name: str) -> int | None:
        value = self.raw(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < _HUGE):
            return value
        return self._wrong(name, "a whole number", value)

    def number(self, name: str) -> float | None:
        value = self.raw(name)
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _HUGE):
            return value
        return self._wrong(name, "a number", value)

    def text(self, name: str) -> str | None:
        value = self.raw(name)
        if isinstance(value, str):
            return check_unicode(value, self._path + name)
        return value if value is None else self._wrong(name, "a string", value)

    def object(self, name: str) -> Fields | None:
        value = self.raw(name)
        if value is None or isinstance(value, dict):
            return None if value is None else Fields(value, f"{self._path}{name}.")
        return self._wrong(name, "an object", value)

    def mapping(self, name: str) -> JsonObject | None:
        value = self.raw(name)
        return value if value is None or isinstance(value, dict) else self._wrong(name, "an object", value)

    def array(self, name: str) -> list[Json] | None:
        value = self.raw(name)
        return value if value is None or isinstance(value, list) else self._wrong(name, "an array", value)

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...] | None:
        values = self.array(name)
        return None if values is None else check_token_ids(values, vocab_size, self._path + name)

    def finish(self) -> None:
        """Deals with every field nobody has read by now. Raises InvalidRequest."""
        for name in self._values:
            if name in self._read:
                continue
            if name in HINTS:
                self.ignored.append(name)
            elif name in REFUSED:
                if not _asks_nothing(name, self._values[name]):
                    raise InvalidRequest(REFUSED[name], param=self._path + name)
            else:
                self._unknown(name, self._read | HINTS)

    def _unknown(self, name: str, known: Collection[str]) -> None:
        near = difflib.get_close_matches(name[:_MAX_SHOWN], sorted(known), n=1)  # its time grows with the length
        hint = f" Did you mean {near[0]!r}?" if near else ""
        shown = _shorten(name)
        raise InvalidRequest(f"Unknown field {shown!r}.{hint}", param=self._path + shown)

    def _wrong(self, name: str, wanted: str, value: Json) -> NoReturn:
        raise wrong_type(self._path + name, wanted, value)


def wrong_type(name: str, wanted: str, value: Json) -> InvalidRequest:
    """The error for a value of another type than ``wanted`` (with its article)."""
    return InvalidRequest(f"{name} must be {wanted}, got {_kind(value)} ({_shown(value)}).", param=name)


def check_unicode(text: str, name: str) -> str:
    """``text``, without half of a surrogate pair: JSON can spell that, and no encoding. Raises InvalidRequest."""
    try:
        text.encode()
    except UnicodeEncodeError:
        message = f"{name} is not valid Unicode text: it holds half of a surrogate pair."
        raise InvalidRequest(message, param=name) from None
    return text


def check_token_ids(values: list[Json], vocab_size: int, name: str) -> tuple[int, ...]:
    """``values`` as token ids of this vocabulary. Raises InvalidRequest."""
    ids: list[int] = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong_type(name, "an array of token ids", value)
        if not 0 <= value < vocab_size:
            raise InvalidRequest(f"{name}: token id {value} is outside the vocabulary of {vocab_size}.", param=name)
        ids.append(value)
    return tuple(ids)


def read_sampling(
    fields: Fields, model: ServedModel, *, max_tokens: int | None, logprobs: int | None, max_logprobs: int
) -> SamplingParams:
    """The sampling fields that both endpoints share, with the model's defaults. Raises InvalidRequest."""
    defaults = model.defaults

    def number(name: str, fallback: float) -> float:
        value = fields.number(name)
        return defaults.get(name, fallback) if value is None else value

    top_k, n, min_tokens = fields.whole("top_k"), fields.whole("n"), fields.whole("min_tokens")
    params = SamplingParams(
        n=1 if n is None else n,
        temperature=number("temperature", 1.0),
        top_p=number("top_p", 1.0),
        top_k=int(defaults.get("top_k", 0)) if top_k is None else top_k,
        min_p=number("min_p", 0.0),
        presence_penalty=number("presence_penalty", 0.0),
        frequency_penalty=number("frequency_penalty", 0.0),
        repetition_penalty=number("repetition_penalty", 1.0),
        logit_bias=_read_logit_bias(fields, model.vocab_size),
        seed=fields.whole("seed"),
        stop=_read_stop(fields),
        stop_token_ids=fields.token_ids("stop_token_ids", model.vocab_size),
        include_stop_str_in_output=fields.flag("include_stop_str_in_output"),
        min_tokens=min_tokens or 0,
        max_tokens=max_tokens,
        ignore_eos=fields.flag("ignore_eos"),
        logprobs=logprobs,
        allowed_token_ids=fields.token_ids("allowed_token_ids", model.vocab_size),
        skip_special_tokens=fields.flag("skip_special_tokens", True),
    )
    return params.checked(max_logprobs=max_logprobs)


def _read_stop(fields: Fields) -> tuple[str, ...] | None:
    value = fields.raw("stop")
    if value is None:
        return None
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise wrong_type("stop", "a string or an array of strings", value)
    texts = [stop for stop in stops if isinstance(stop, str)]
    if len(texts) != len(stops):
        raise wrong_type("stop", "a string or an array of strings", value)
    if len(texts) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(texts)}.", param="stop")
    if any(len(text) > _MAX_STOP_LENGTH for text in texts):
        raise InvalidRequest(f"A stop string may have at most {_MAX_STOP_LENGTH} characters.", param="stop")
    return tuple(check_unicode(text, "stop") for text in texts)


def _read_logit_bias(fields: Fields, vocab_size: int) -> dict[int, float] | None:
    """JSON's keys are strings; both kinds of number become one mapping."""
    values = fields.mapping("logit_bias")
    bias: dict[int, float] = {}
    for key, value in (values or {}).items():
        if not (len(key) < 20 and key.isascii() and key.isdigit() and int(key) < vocab_size):
            shown = _shorten(key)
            raise InvalidRequest(
                f"logit_bias: {shown!r} is no token id of the vocabulary of {vocab_size}.", param="logit_bias"
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) >= _HUGE:
            raise wrong_type("logit_bias", "an object of numbers from -100 to 100", value)
        bias[int(key)] = value
    return bias or None


def room_for_output(num_prompt: int, requested: int | None, default: int | None, max_model_len: int) -> int:
    """max_tokens of a request with ``num_prompt`` prompt tokens: what it asked for, else ``default`` or all the room.

    Raises InvalidRequest, in the words that clients look for, when the context is too short.
    """
    room = max_model_len - num_prompt
    if room < 1:
        raise too_long(num_prompt, max_model_len)
    if requested is not None and requested > room:
        raise InvalidRequest(
            f"{_limit(max_model_len)}you requested {requested} output tokens and your prompt contains {num_prompt} "
            f"input tokens, for a total of {num_prompt + requested} tokens. Please reduce the length of the input "
            "prompt or the number of requested output tokens.",
            param="max_tokens",
        )
    if requested is not None:
        return requested
    return room if default is None else min(default, room)


def too_long(num_prompt: int, max_model_len: int, *, is_all: bool = True) -> InvalidRequest:
    """The error for a prompt that fills the context. ``is_all``: there are no more tokens than that."""
    number = f"{num_prompt}" if is_all else f"at least {num_prompt}"
    return InvalidRequest(
        f"{_limit(max_model_len)}your prompt contains {number} input tokens, which leaves no room for output. "
        "Please reduce the length of the input prompt.",
        param="input_tokens",
    )


def _limit(max_model_len: int) -> str:
    return f"This model's maximum context length is {max_model_len} tokens. However, "


def _asks_nothing(name: str, value: Json) -> bool:
    """Whether a refused field's value only spells out its absence."""
    if name == "length_penalty":
        return value == 1.0
    return value is False or value in ([], {}, "", "none")


def _kind(value: Json) -> str:
    if value is None:
        return "null"
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return names[type(value)]


def _shown(value: Json) -> str:
    try:
        return _shorten(json.dumps(value))
    except RecursionError:  # it was read with fewer calls above
        return "nested too deeply to show"


def _shorten(text: str) -> str:
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
