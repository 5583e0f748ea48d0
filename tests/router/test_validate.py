"""Every field is honoured, named as ignored, or refused; whatever a client sends, the error says which field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.errors import InvalidRequest
from proto.settings import RouterSettings
from router.openai.schema import ChatBody, CompletionBody, read_chat, read_completion
from router.validate import HINTS, REFUSED, Fields, parse_object, room_for_output
from tests.support.http import served_model

MODEL = served_model()
USER = {"role": "user", "content": "hi"}


def completion(**body: Any) -> CompletionBody:
    return read_completion(Fields({"prompt": "hi", **body}), MODEL, RouterSettings())


def chat(**body: Any) -> ChatBody:
    return read_chat(Fields({"messages": [USER], **body}), MODEL, RouterSettings())


def refusal(read: Any, **body: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        read(**body)
    return caught.value


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b'"x"', b'{"a": NaN}', b'{"a": Infinity}', b"\xff\xfe{", b"[" * 100_000, b"1" * 5000],
)
def test_a_body_that_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest, match="request body"):
        parse_object(raw)


def test_padding_that_is_not_done_is_named() -> None:
    options = {"include_obfuscation": True}
    assert chat(stream=True, stream_options=options).options.ignored == ("stream_options.include_obfuscation",)
    assert chat(stream=True, stream_options={"include_obfuscation": False}).options.ignored == ()


def test_a_value_nested_too_deeply_to_be_shown_is_refused_like_any_other() -> None:
    value: Any = []
    for _ in range(100_000):
        value = [value]
    for body in ({"temperature": value}, {"stop": [value]}, {"prompt": {"x": value}}):
        assert refusal(completion, **body).param == next(iter(body))
    assert refusal(chat, messages=[{"role": "user", "content": {"x": value}}]).param == "messages[0].content"


# Fields nobody knows, and fields we cannot honour.


def test_a_name_of_any_length_is_compared_by_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    monkeypatch.setattr("difflib.get_close_matches", lambda name, known, n: compared.append(name) or [])
    assert "xxx..." in refusal(completion, **{"x" * 1_000_000: 1}).message
    assert [len(name) for name in compared] == [80]


def test_unknown_fields_are_named_with_their_nearest_relative() -> None:
    error = refusal(completion, temprature=1)
    assert "'temprature'" in error.message
    assert "'temperature'" in error.message
    assert error.param == "temprature"
    assert "Did you mean" not in refusal(chat, zzzzzzzz=1).message
    assert refusal(chat, stream=True, stream_options={"include_usge": True}).param == "stream_options.include_usge"


def test_hostile_field_names_are_shown_harmlessly() -> None:
    error = refusal(chat, **{"\ud800\n" + "x" * 500: 1})
    assert error.message.isascii()
    assert len(error.message) < 200


@pytest.mark.parametrize("name", sorted(HINTS))
def test_hints_are_accepted_and_named(name: str) -> None:
    assert chat(**{name: "x"}).options.ignored == (name,)
    assert completion(**{name: {"a": 1}}).options.ignored == (name,)
    assert chat(**{name: None}).options.ignored == ()


@pytest.mark.parametrize("name", sorted(REFUSED))
@pytest.mark.parametrize("read", [chat, completion])
def test_what_cannot_be_honoured_is_refused(name: str, read: Any) -> None:
    error = refusal(read, **{name: {"x": 1}})
    assert error.param == name
    assert error.message == REFUSED[name]
    read(**{name: None})
    read(**{name: 1.0 if name == "length_penalty" else False})


@pytest.mark.parametrize("kind", ["json_object", "json_schema", "structural_tag", "nonsense", None])
@pytest.mark.parametrize("read", [chat, completion])
def test_constrained_output_is_refused(kind: str | None, read: Any) -> None:
    assert refusal(read, response_format={"type": kind}).param == "response_format"
    read(response_format={"type": "text"})


TOOL = {"type": "function", "function": {"name": "f"}}


def test_tools_are_shown_but_never_called() -> None:
    assert chat(tools=[TOOL], tool_choice="none").conversation.tools == [TOOL]
    assert chat(tool_choice="auto").conversation.tools is None
    assert refusal(chat, tools=[TOOL]).param == "tools"
    assert refusal(chat, tools=[]).param == "tools"
    assert refusal(chat, tools=["f"], tool_choice="none").param == "tools[0]"
    for choice in ("auto", "required", {"type": "function", "function": {"name": "f"}}):
        assert refusal(chat, tools=[TOOL], tool_choice=choice).param == "tool_choice"
    assert refusal(chat, tool_choice="required").param == "tool_choice"


@pytest.mark.parametrize(
    ("read", "body", "param"),
    [
        (completion, {"suffix": "end"}, "suffix"),
        (completion, {"best_of": 2}, "best_of"),
        (completion, {"echo": True, "logprobs": 0}, "echo"),
        (completion, {"max_tokens": 0}, "max_tokens"),
        (completion, {"max_tokens": -1}, "max_tokens"),
        (completion, {"logprobs": 21}, "logprobs"),
        (completion, {"logprobs": True}, "logprobs"),
        (completion, {"stream_options": {"include_usage": True}}, "stream_options"),
        (completion, {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        (completion, {"truncation_side": "middle"}, "truncation_side"),
        (completion, {"cache_salt": ""}, "cache_salt"),
        (completion, {"cache_salt": "x" * 129}, "cache_salt"),
        (completion, {"temperature": "hot"}, "temperature"),
        (completion, {"temperature": 2.1}, "temperature"),
        (completion, {"temperature": 10**300}, "temperature"),
        (completion, {"temperature": True}, "temperature"),
        (completion, {"top_p": 0}, "top_p"),
        (completion, {"n": 0}, "n"),
        (completion, {"n": 1.5}, "n"),
        (completion, {"n": 2, "temperature": 0}, "n"),
        (completion, {"seed": 2**70}, "seed"),
        (completion, {"stream": "yes"}, "stream"),
        (completion, {"priority": "high"}, "priority"),
        (completion, {"priority": 1 << 63}, "priority"),
        (chat, {"priority": -(1 << 63) - 1}, "priority"),
        (completion, {"stop": "\ud800"}, "stop"),
        (chat, {"stop": ["x", "a\udfff"]}, "stop"),
        (completion, {"cache_salt": "\ud800"}, "cache_salt"),
        (completion, {"logit_bias": {"5": 10**310}}, "logit_bias"),
        (chat, {"logit_bias": {"5": 1e300}}, "logit_bias"),
        (completion, {"stop": ""}, "stop"),
        (completion, {"stop": ["a"] * 17}, "stop"),
        (completion, {"stop": ["a", 1]}, "stop"),
        (completion, {"stop": {"a": 1}}, "stop"),
        (completion, {"stop": "x" * 1025}, "stop"),
        (completion, {"stop_token_ids": [420]}, "stop_token_ids"),
        (completion, {"stop_token_ids": 3}, "stop_token_ids"),
        (completion, {"allowed_token_ids": []}, "allowed_token_ids"),
        (completion, {"logit_bias": {"420": 1}}, "logit_bias"),
        (completion, {"logit_bias": {"x": 1}}, "logit_bias"),
        (completion, {"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        (completion, {"logit_bias": {"1": "x"}}, "logit_bias"),
        (completion, {"logit_bias": {"1": 101}}, "logit_bias"),
        (completion, {"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        (chat, {"top_logprobs": 2}, "top_logprobs"),
        (chat, {"logprobs": 3}, "logprobs"),
        (chat, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (chat, {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        (chat, {"modalities": ["text", "audio"]}, "modalities"),
        (chat, {"echo": True}, "echo"),
        (chat, {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        (chat, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        (chat, {"max_completion_tokens": 0}, "max_completion_tokens"),
        (chat, {"max_tokens": 0}, "max_tokens"),
        (chat, {"prompt": "x"}, "prompt"),
    ],
)
def test_wrong_values_name_their_field(read: Any, body: dict[str, Any], param: str) -> None:
    assert refusal(read, **body).param == param


@pytest.mark.parametrize("prompt", [None, 7, {}, [], [[]], [1.5], [[1], "x", 3], [True], ["x", None], [420], [-1]])
def test_prompts_of_the_wrong_form(prompt: Any) -> None:
    assert refusal(completion, prompt=prompt).param == "prompt"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("x", ("x",)),
        (["x", "y"], ("x", "y")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        (["x", [3]], ("x", (3,))),
    ],
)
def test_the_forms_of_a_prompt(prompt: Any, expected: tuple) -> None:
    assert completion(prompt=prompt).prompts == expected


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hi",
        ["hi"],
        [{"content": "x"}],
        [{"role": 3, "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": 3, "text": "x"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "input_audio"}]}],
        [{"role": "assistant", "tool_calls": "x"}],
        [{"role": "assistant", "tool_calls": [{}]}],
    ],
)
def test_messages_of_the_wrong_form(messages: Any) -> None:
    assert (refusal(chat, messages=messages).param or "").startswith("messages")


def test_messages_take_the_form_that_templates_expect() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    parts = [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]
    body = chat(
        messages=[
            {"role": "user", "content": parts, "name": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "assistant", "content": "x", "tool_calls": []},
        ]
    )
    first, second, third = body.conversation.messages
    assert first == {"role": "user", "content": "a\nb"}
    assert second == {"role": "assistant", "content": None, "tool_calls": [call]}
    assert "tool_calls" not in third


def test_values_reach_the_sampling_parameters() -> None:
    body = completion(
        temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, n=2.0, seed=-2, stop="x", stop_token_ids=[3], min_tokens=1,
        logit_bias={"5": -100, "4": 1.5}, presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.1,
        ignore_eos=True, logprobs=0, include_stop_str_in_output=True, skip_special_tokens=False, max_tokens=9,
    )  # fmt: skip
    params = body.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.n) == (0.5, 0.9, 0, 0.1, 2)
    assert (params.seed, params.stop_strings, params.stop_token_ids) == (2**64 - 2, ("x",), (3,))
    assert params.bias_items == ((4, 1.5), (5, -100))
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1, -1, 1.1)
    assert (params.logprobs, params.min_tokens, params.ignore_eos) == (0, 1, True)
    assert params.include_stop_str_in_output
    assert not params.skip_special_tokens
    assert body.options.max_tokens == 9


def test_the_models_defaults_fill_what_is_missing() -> None:
    model = served_model({"generation_config.json": b'{"temperature": 0.6, "top_k": 20}'})
    for sent, expected in (
        ({}, (0.6, 20)),
        ({"temperature": 0, "top_k": 0}, (0, 0)),
        ({"temperature": None}, (0.6, 20)),
    ):
        params = read_completion(Fields({"prompt": "x", **sent}), model, RouterSettings()).params
        assert (params.temperature, params.top_k) == expected


def test_stream_options_that_ask_for_nothing_need_no_stream() -> None:
    assert not completion(stream_options={}).options.stream
    assert not chat(stream_options={}).options.include_usage


def test_max_completion_tokens_wins() -> None:
    assert chat(max_completion_tokens=5, max_tokens=9).options.max_tokens == 5
    assert chat(max_tokens=9).options.max_tokens == 9
    assert chat().options.max_tokens is None


@pytest.mark.parametrize(
    ("num_prompt", "requested", "default", "expected"),
    [(10, None, 16, 16), (95, None, 16, 5), (10, None, None, 90), (10, 90, 16, 90), (99, 1, None, 1)],
)
def test_room_for_output(num_prompt: int, requested: int | None, default: int | None, expected: int) -> None:
    assert room_for_output(num_prompt, requested, default, 100) == expected


@pytest.mark.parametrize(("num_prompt", "requested"), [(100, None), (500, 1), (10, 91)])
def test_too_long_for_the_context_says_so_in_the_usual_words(num_prompt: int, requested: int | None) -> None:
    with pytest.raises(InvalidRequest, match=r"This model's maximum context length is 100 tokens\. However, "):
        room_for_output(num_prompt, requested, 16, 100)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    ["prompt", "messages", "n", "stop", "stream", "stream_options", "logit_bias", "tools", "tool_choice", "logprobs",
     "response_format", "max_tokens", "seed", "stop_token_ids", "chat_template_kwargs", "documents", "temperature",
     "best_of", "truncate_prompt_tokens", "cache_salt", "priority", "echo", "modalities", "user", "guided_json"]
)  # fmt: skip


@given(body=st.dictionaries(NAMES, JSON, max_size=6))
@settings(max_examples=300, deadline=None)
def test_any_json_is_read_or_refused_and_nothing_else(body: dict[str, Any]) -> None:
    for read in (chat, completion):
        try:
            read(**body)
        except InvalidRequest as error:
            json.dumps(error.message).encode()
