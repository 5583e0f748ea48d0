"""/v1/chat/completions, by hand and through OpenAI's own client."""

from __future__ import annotations

import asyncio

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from proto.errors import Overloaded
from proto.request import FinishReason
from proto.settings import RouterSettings
from tests.support.http import ScriptedFlow, saying, served_model, serving

MODEL = served_model()
PATH = "/v1/chat/completions"
TEXT = "Hello 你好 😀 world"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
BODY = {"model": "tiny", "messages": MESSAGES}


def flow(text: str = TEXT, finish: FinishReason = FinishReason.STOP) -> ScriptedFlow:
    return ScriptedFlow(saying(MODEL, text, finish=finish))


async def test_the_whole_answer() -> None:
    async with serving(flow(f"{TEXT}<|end|>"), MODEL) as site:
        status, body, headers = await site.post(PATH, BODY)
    assert status == 200
    assert body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": TEXT,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "reasoning": None,
    }
    assert (choice["index"], choice["finish_reason"], choice["stop_reason"], choice["logprobs"]) == (
        0,
        "stop",
        None,
        None,
    )
    assert body["usage"]["completion_tokens"] == len(MODEL.encode(TEXT)) + 1
    assert "Server-Timing" in headers
    (new,) = site.flow.requests
    assert MODEL.decode(new.prompt, skip_special_tokens=False) == (
        "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>"
    )
    assert new.params.max_tokens == MODEL.max_model_len - len(new.prompt)


async def test_the_order_of_a_stream() -> None:
    async with serving(flow(f"{TEXT}<|end|>"), MODEL) as site:
        chunks = await site.chunks(PATH, {**BODY, "n": 2, "stream_options": {"include_usage": True}})
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    *chunks, last = chunks
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 2 * (len(MODEL.encode(TEXT)) + 1)
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        first, *middle, end = choices
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert first["finish_reason"] is None
        assert all(set(choice["delta"]) == {"content"} and choice["delta"]["content"] for choice in middle)
        assert all(choice["finish_reason"] is None for choice in middle)
        assert "".join(choice["delta"]["content"] for choice in middle) == TEXT
        assert (end["delta"], end["finish_reason"], end["stop_reason"]) == ({}, "stop", None)


async def test_an_answer_without_text_still_has_role_and_end() -> None:
    async with serving(flow("<|end|>"), MODEL) as site:
        chunks = await site.chunks(PATH, BODY)
        assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"role": "assistant", "content": ""}, {}]
        assert (await site.post(PATH, BODY))[1]["choices"][0]["message"]["content"] == ""


async def test_logprobs_carry_true_bytes() -> None:
    async with serving(flow("é你", FinishReason.LENGTH), MODEL) as site:
        body = {**BODY, "logprobs": True, "top_logprobs": 2}
        content = (await site.post(PATH, body))[1]["choices"][0]["logprobs"]["content"]
        chunks = await site.chunks(PATH, body)
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "é你"
    assert all(entry["logprob"] == -0.5 and len(entry["top_logprobs"]) == 2 for entry in content)
    streamed = [c["logprobs"]["content"] for chunk in chunks for c in chunk["choices"] if c["logprobs"]]
    assert [entry for entries in streamed for entry in entries] == content


async def test_logprobs_without_alternatives() -> None:
    async with serving(flow("hi", FinishReason.LENGTH), MODEL) as site:
        body = {**BODY, "logprobs": True, "return_tokens_as_token_ids": True}
        content = (await site.post(PATH, body))[1]["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [f"token_id:{token}" for token in MODEL.encode("hi")]
    assert all(entry["top_logprobs"] == [] for entry in content)


async def test_token_ids_on_request() -> None:
    async with serving(flow("hi", FinishReason.LENGTH), MODEL) as site:
        body = {**BODY, "return_token_ids": True}
        whole = (await site.post(PATH, body))[1]
        chunks = await site.chunks(PATH, body)
    assert whole["prompt_token_ids"] == chunks[0]["prompt_token_ids"] == list(site.flow.requests[0].prompt)
    assert whole["choices"][0]["token_ids"] == MODEL.encode("hi")
    assert [token for c in chunks for token in c["choices"][0].get("token_ids", [])] == MODEL.encode("hi")


async def test_continuing_the_assistants_words() -> None:
    async with serving(flow(" sure"), MODEL) as site:
        messages = [*MESSAGES, {"role": "assistant", "content": "I am"}]
        body = {"messages": messages, "continue_final_message": True}
        assert (await site.post(PATH, body))[0] == 200
    text = MODEL.decode(site.flow.requests[0].prompt, skip_special_tokens=False)
    assert text.endswith("<|assistant|>I am")


async def test_template_arguments_tools_and_documents_reach_the_template() -> None:
    template = "{{ mood }}{{ tools | tojson }}{{ documents[0].text }}{{ messages[0].content }}"
    async with serving(flow("x"), served_model(template=template)) as site:
        body = {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]}],
            "chat_template_kwargs": {"mood": "happy"},
            "tools": [{"type": "function"}],
            "tool_choice": "none",
            "documents": [{"text": "doc"}],
        }
        assert (await site.post(PATH, body))[0] == 200
    assert MODEL.decode(site.flow.requests[0].prompt) == 'happy[{"type": "function"}]docHi\n!'


@pytest.mark.parametrize(
    ("function", "shown"),
    [({"name": "f", "arguments": '{"a":  1}'}, 'call f{"a":  1}'), ({"name": "f"}, "call f{}")],
)
async def test_a_call_in_the_history_reaches_a_template_that_asks_for_null_content(function: dict, shown: str) -> None:
    template = (
        "{% for m in messages %}{% if m.content is none %}{% for call in m.tool_calls %}"
        "{{ 'call ' + call.function.name + call.function.arguments }}{% endfor %}"
        "{% else %}{{ m.content }} {% endif %}{% endfor %}"
    )
    messages = [MESSAGES[1], {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}]
    async with serving(flow("x"), served_model(template=template)) as site:
        status, body, _ = await site.post(PATH, {"messages": messages})
    assert status == 200, body
    assert MODEL.decode(site.flow.requests[0].prompt) == f"Hi {shown}"


async def test_the_operators_template_variables_stand_behind_the_clients() -> None:
    settings = RouterSettings(default_chat_template_kwargs={"mood": "calm", "lamp": "on"})
    async with serving(flow("x"), served_model(template="{{ mood }} {{ lamp }}"), settings) as site:
        assert (await site.post(PATH, {"messages": MESSAGES}))[0] == 200
        assert (await site.post(PATH, {"messages": MESSAGES, "chat_template_kwargs": {"mood": "wild"}}))[0] == 200
    assert [MODEL.decode(new.prompt) for new in site.flow.requests] == ["calm on", "wild on"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "--chat-template"),
        ("{{ raise_exception('only users here') }}", "only users here"),
        ("{{ messages[0].content.nothing.at_all }}", "chat template refused"),
    ],
)
async def test_template_trouble_is_a_bad_request(template: str | None, words: str) -> None:
    async with serving(flow(), served_model(template=template)) as site:
        status, body, _ = await site.post(PATH, BODY)
        assert (status, body["error"]["param"]) == (400, "messages")
        assert words in body["error"]["message"]
        assert (await site.post("/v1/completions", {"prompt": "x"}))[0] == 200


async def test_a_conversation_too_long() -> None:
    async with serving(flow(), MODEL) as site:
        status, body, _ = await site.post(PATH, {"messages": [{"role": "user", "content": "😡" * 9000}]})
    assert status == 400
    assert "maximum context length is 256 tokens. However" in body["error"]["message"]


async def test_the_role_of_answers_is_a_setting() -> None:
    async with serving(flow(), MODEL, RouterSettings(response_role="butler")) as site:
        assert (await site.post(PATH, BODY))[1]["choices"][0]["message"]["role"] == "butler"
        assert (await site.chunks(PATH, BODY))[0]["choices"][0]["delta"]["role"] == "butler"


# OpenAI's client.


async def test_openai_async_client() -> None:
    async with serving(flow(), MODEL) as site, AsyncOpenAI(base_url=f"{site.base_url}/v1", api_key="any") as client:
        whole = await client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=1)
        assert TEXT.startswith(whole.choices[0].message.content)
        assert whole.choices[0].logprobs.content[0].bytes
        stream = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, n=2
        )
        text, usage = "", None
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += (choice.delta.content or "") if choice.index == 1 else ""
        assert text == whole.choices[0].message.content
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        completion = await client.completions.create(model="tiny", prompt=["a", "b"], logprobs=1)
        assert [choice.index for choice in completion.choices] == [0, 1]
        streamed = await client.completions.create(model="tiny", prompt="a", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in streamed]) == completion.choices[0].text
        assert [model.id async for model in client.models.list()] == ["tiny", "org/tiny-alias"]
        assert (await client.models.retrieve("org/tiny-alias")).id == "org/tiny-alias"


async def test_openai_sync_client() -> None:
    def ask(base_url: str) -> tuple[str, str]:
        with OpenAI(base_url=f"{base_url}/v1", api_key="any") as client:
            whole = client.chat.completions.create(model="tiny", messages=MESSAGES)
            stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
            return whole.choices[0].message.content, "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    async with serving(flow(), MODEL) as site:
        whole, streamed = await asyncio.to_thread(ask, site.base_url)
    assert whole == streamed
    assert TEXT.startswith(whole)


async def test_openai_client_raises_its_own_errors() -> None:
    settings = RouterSettings(api_key=("k",))
    busy = ScriptedFlow(lambda new: Overloaded("full", retry_after_s=1))
    async with serving(busy, MODEL, settings) as site:
        options = {"base_url": f"{site.base_url}/v1", "max_retries": 0}
        async with AsyncOpenAI(api_key="wrong", **options) as client:
            with pytest.raises(openai.AuthenticationError, match="API key"):
                await client.models.list()
        async with AsyncOpenAI(api_key="k", **options) as client:
            with pytest.raises(openai.RateLimitError, match="full"):
                await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
            with pytest.raises(openai.NotFoundError, match="does not exist"):
                await client.chat.completions.create(model="none", messages=MESSAGES)
            with pytest.raises(openai.BadRequestError, match="constrain") as caught:
                await client.chat.completions.create(
                    model="tiny", messages=MESSAGES, response_format={"type": "json_object"}
                )
            assert caught.value.param == "response_format"
