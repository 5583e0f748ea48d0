"""/v1/completions: prompts in four forms, choices in order, text that stops where it should, chunks of a stream."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.request import FinishReason, SamplingParams, TokenOut
from proto.settings import RouterSettings
from router.contract import NewRequest
from router.openai.generation import Generation
from router.tokenizer import ServedModel
from router.validate import check_token_ids
from tests.support.http import ScriptedFlow, byte_level_json, saying, served_model, serving, tokens_of

MODEL = served_model()
PATH = "/v1/completions"
TEXT = "Paris is 你好 😀 the capital STOP of France"


def flow(text: str = TEXT, finish: FinishReason = FinishReason.LENGTH) -> ScriptedFlow:
    return ScriptedFlow(saying(MODEL, text, finish=finish), num_cached=2)


def joined(chunks: list[dict]) -> dict[int, str]:
    texts: dict[int, str] = defaultdict(str)
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    return dict(texts)


async def test_the_whole_answer() -> None:
    async with serving(flow(), MODEL) as site:
        status, body, headers = await site.post(PATH, {"model": "tiny", "prompt": "x", "max_tokens": 99})
    assert status == 200
    num_tokens = len(MODEL.encode(TEXT))
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    assert body["system_fingerprint"].endswith("-01234567")
    assert body["choices"] == [
        {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert body["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": num_tokens,
        "total_tokens": num_tokens + 1,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert headers["x-tandem-prefill"] == "prefill-0"
    assert headers["x-tandem-decode"] == "decode-0"
    assert headers["Server-Timing"].startswith("queued;dur=1.0, prefilling;dur=20.0, ttft;dur=")
    assert "timings" not in body
    (new,) = site.flow.requests
    assert new.params.max_tokens == 99
    assert new.params.seed is None


async def test_the_same_text_in_a_stream() -> None:
    async with serving(flow(), MODEL) as site:
        chunks = await site.chunks(PATH, {"prompt": "x"})
    assert joined(chunks) == {0: TEXT}
    assert all("\ufffd" not in chunk["choices"][0]["text"] for chunk in chunks)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk and "timings" not in chunk for chunk in chunks)


async def test_usage_comes_last_and_timings_only_on_request() -> None:
    async with serving(flow("hi"), MODEL) as site:
        usage = {"include_usage": True}
        *chunks, last = await site.chunks(PATH, {"prompt": "x", "stream_options": usage})
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == len(MODEL.encode("hi"))
        assert "timings" not in last
        assert all("usage" not in chunk for chunk in chunks)
        for body, headers in (
            ({"stream_options": {**usage, "include_timings": True}}, {}),
            ({}, {"x-tandem-timings": "1"}),
        ):
            *_, last = await site.chunks(PATH, {"prompt": "x", **body}, **headers)
            assert last["timings"]["stages_ms"] == {"queued": 1.0, "prefilling": 20.0}
            assert last["timings"]["prefill_workers"] == ["prefill-0"]
            assert last["timings"]["kv_bytes_moved"] == 4096
        _, whole, _ = await site.post(PATH, {"prompt": "x"}, **{"x-tandem-timings": "1"})
        assert whole["timings"]["total_ms"] >= whole["timings"]["ttft_ms"] > 0


async def test_continuous_usage_counts_up() -> None:
    async with serving(flow("Hello world how"), MODEL) as site:
        options = {"continuous_usage_stats": True, "include_usage": True}
        chunks = await site.chunks(PATH, {"prompt": "x", "stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == len(MODEL.encode("Hello world how"))


async def test_continuous_usage_alone_adds_no_chunk_without_a_choice() -> None:
    async with serving(flow("Hello world how"), MODEL) as site:
        chunks = await site.chunks(PATH, {"prompt": "x", "stream_options": {"continuous_usage_stats": True}})
    assert all(chunk["choices"] and chunk["usage"] for chunk in chunks)


async def test_an_empty_model_is_the_one_there_is() -> None:
    async with serving(flow("hi"), MODEL) as site:
        status, body, _ = await site.post(PATH, {"model": "", "prompt": "x"})
    assert (status, body.get("model")) == (200, "tiny")


@pytest.mark.parametrize("stream", [False, True])
async def test_index_is_prompt_times_n_plus_choice(stream: bool) -> None:
    def script(new: NewRequest) -> list:
        return saying(MODEL, f"saw {MODEL.decode(new.prompt)}")(new)

    body = {"prompt": ["a", "bb", "ccc"], "n": 2, "max_tokens": 50}
    async with serving(ScriptedFlow(script), MODEL) as site:
        if stream:
            texts = joined(await site.chunks(PATH, body))
        else:
            choices = (await site.post(PATH, body))[1]["choices"]
            assert [choice["index"] for choice in choices] == list(range(6))
            texts = {choice["index"]: choice["text"] for choice in choices}
    assert texts == {0: "saw a", 1: "saw a", 2: "saw bb", 3: "saw bb", 4: "saw ccc", 5: "saw ccc"}
    assert [made.num_closed for made in site.flow.streams] == [1, 1, 1]


@pytest.mark.parametrize(("prompts", "is_aside"), [(["x" * 100] * 2, False), (["x" * 9000] * 2, True)])
async def test_prompts_that_are_long_together_do_not_hold_up_the_event_loop(
    prompts: list[str], is_aside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, threads = MODEL.encode, set()

    def noted(text: str, *, add_special_tokens: bool = True) -> list[int]:
        if text in prompts:
            threads.add(threading.get_ident())
        return encode(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(MODEL, "encode", noted)
    async with serving(flow(), MODEL) as site:
        status, _, _ = await site.post(PATH, {"prompt": [*prompts, "b"], "truncate_prompt_tokens": 3})
    assert status == 200
    assert [len(new.prompt) for new in site.flow.requests] == [3, 3, 1]
    assert len(threads) == 1
    assert threads.isdisjoint({threading.get_ident()}) == is_aside


@pytest.mark.parametrize(("num_prompts", "is_aside"), [(2, False), (200, True)])
async def test_many_token_ids_do_not_hold_up_the_event_loop(
    num_prompts: int, is_aside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set()

    def noted(values: list, vocab_size: int, name: str) -> tuple[int, ...]:
        threads.add(threading.get_ident())
        return check_token_ids(values, vocab_size, name)

    monkeypatch.setattr("router.openai.schema.check_token_ids", noted)
    async with serving(flow(), MODEL) as site:
        status, _, _ = await site.post(PATH, {"prompt": [[5] * 100] * num_prompts})
    assert status == 200
    assert len(site.flow.requests) == num_prompts
    assert threads.isdisjoint({threading.get_ident()}) == is_aside


async def test_others_run_while_many_prompts_start_and_who_leaves_then_leaves_nothing() -> None:
    many = [NewRequest(prompt=(5,), params=SamplingParams(max_tokens=1))] * 20
    asked = flow()
    starting = asyncio.ensure_future(Generation.start(asked, MODEL, many))
    await asked.started.wait()
    assert len(asked.streams) < 3
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert len(asked.streams) < 4
    assert [made.num_closed for made in asked.streams] == [1] * len(asked.streams)


async def test_if_one_prompt_cannot_start_none_goes_on() -> None:
    def script(new: NewRequest) -> object:
        return [asyncio.Event()] if len(new.prompt) == 1 else RuntimeError("full")

    async with serving(ScriptedFlow(script), MODEL) as site:
        status, _, _ = await site.post(PATH, {"prompt": [[5], [6], [7, 8]]})
    assert status == 500
    assert [made.num_closed for made in site.flow.streams] == [1, 1]
    assert [len(made.failures) for made in site.flow.streams] == [1, 1]


async def test_if_one_prompt_fails_so_do_the_others() -> None:
    def script(new: NewRequest) -> list:
        return [asyncio.Event()] if new.prompt == (5,) else [tokens_of(MODEL, "a"), RuntimeError("x")]

    async with serving(ScriptedFlow(script), MODEL) as site:
        status, _, _ = await site.post(PATH, {"prompt": [[5], [6]]})
    assert status == 500
    assert [made.num_closed for made in site.flow.streams] == [1, 1]
    assert [len(made.failures) for made in site.flow.streams] == [1, 1]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_whose_head_cannot_be_made_leaves_nothing_running(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.openai.serving.answer_headers", lambda *_, complete: {"x-tandem-decode": "工人"})
    async with serving(flow(), MODEL) as site:
        status, _, _ = await site.post(PATH, {"prompt": "x", "stream": stream})
    assert status == 500
    assert [made.num_closed for made in site.flow.streams] == [1]


async def test_prompts_as_token_ids_go_through_untouched() -> None:
    async with serving(flow("hi"), MODEL) as site:
        await site.post(PATH, {"prompt": [5, 6, 7]})
        await site.post(PATH, {"prompt": [[5], [0, 1]]})
    assert [new.prompt for new in site.flow.requests] == [(5, 6, 7), (5,), (0, 1)]


async def test_special_tokens_are_added_to_text_unless_refused() -> None:
    model = served_model({"tokenizer.json": byte_level_json(adds_bos=True)})
    async with serving(flow("hi"), model) as site:
        for extra in ({}, {"add_special_tokens": False}):
            await site.post(PATH, {"prompt": "x", **extra})
    with_bos, without = (new.prompt for new in site.flow.requests)
    assert with_bos == (0, *without)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"truncate_prompt_tokens": 2}, (8, 9)),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, (5, 6)),
        ({"truncate_prompt_tokens": 9}, (5, 6, 7, 8, 9)),
        ({"truncate_prompt_tokens": -1, "max_tokens": 253}, (7, 8, 9)),
    ],
)
async def test_truncated_prompts(options: dict, kept: tuple[int, ...]) -> None:
    async with serving(flow("hi"), MODEL) as site:
        assert (await site.post(PATH, {"prompt": [5, 6, 7, 8, 9], **options}))[0] == 200
    assert site.flow.requests[0].prompt == kept


async def test_a_long_text_is_encoded_off_the_loop_with_the_same_result() -> None:
    text = "Hello world " * 2000
    async with serving(flow("hi"), served_model(max_model_len=100_000)) as site:
        assert (await site.post(PATH, {"prompt": text}))[0] == 200
    assert list(site.flow.requests[0].prompt) == MODEL.encode(text)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": ""}, "empty"),
        (
            {"prompt": list(range(5, 15)) * 26},
            "maximum context length is 256 tokens. However, your prompt contains 260",
        ),
        ({"prompt": [5], "max_tokens": 256}, "maximum context length is 256 tokens. However, you requested 256"),
        ({"prompt": "x", "min_tokens": 17}, "min_tokens"),
    ],
)
async def test_prompts_that_do_not_fit(body: dict, words: str) -> None:
    async with serving(flow(), MODEL) as site:
        status, reply, _ = await site.post(PATH, body)
    assert status == 400
    assert words in reply["error"]["message"]
    assert site.flow.requests == []


async def test_a_prompt_far_too_long_is_refused_by_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []

    def encode(text: str, *, add_special_tokens: bool = True) -> list[int]:
        encoded.append(len(text))
        return ServedModel.encode(model, text, add_special_tokens=add_special_tokens)

    model = served_model()
    monkeypatch.setattr(model, "encode", encode)
    body = {"prompt": "word " * 100_000, "max_tokens": 1}
    async with serving(ScriptedFlow(saying(model, "x")), model) as site:
        status, reply, _ = await site.post(PATH, body)
        assert status == 400
        assert "maximum context length is 256 tokens. However, your prompt contains at least" in str(reply)
        assert max(encoded) < 20_000
        assert (await site.post(PATH, {**body, "truncate_prompt_tokens": 9}))[0] == 200
    assert len(site.flow.requests[0].prompt) == 9


async def test_a_long_prompt_of_few_tokens_is_served() -> None:
    model = served_model(max_model_len=16_384)
    text = "<|user|><|assistant|>" * 8_000  # 20 characters a pair, more than any text is suspected of
    async with serving(ScriptedFlow(saying(model, "x")), model) as site:
        assert (await site.post(PATH, {"prompt": text, "max_tokens": 1}))[0] == 200
    assert len(site.flow.requests[0].prompt) == 16_000


async def test_max_tokens_default_and_the_context() -> None:
    async with serving(flow("hi"), MODEL) as site:
        await site.post(PATH, {"prompt": "x"})
        await site.post(PATH, {"prompt": [5] * 250})
    assert [new.params.max_tokens for new in site.flow.requests] == [16, 6]


async def test_ignored_hints_are_named_in_a_header() -> None:
    async with serving(flow("hi"), MODEL) as site:
        for stream in (False, True):
            async with site.http.post(
                PATH, json={"prompt": "x", "user": "u", "store": True, "stream": stream}
            ) as reply:
                assert reply.headers["x-tandem-ignored"] == "user, store"
        assert "x-tandem-ignored" not in (await site.post(PATH, {"prompt": "x"}))[2]


async def test_salt_and_priority_reach_the_flow() -> None:
    async with serving(flow("hi"), MODEL) as site:
        await site.post(PATH, {"prompt": "x", "cache_salt": "s", "priority": -3})
    assert (site.flow.requests[0].cache_salt, site.flow.requests[0].priority) == ("s", -3)
    assert site.flow.requests[0].layout == MODEL.card.layout
    assert site.flow.requests[0].spent_s > 0


# Where text stops.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"stop": "STOP"}, ("Paris is 你好 😀 the capital ", "stop", "STOP")),
        ({"stop": ["France", "capital STOP"]}, ("Paris is 你好 😀 the ", "stop", "capital STOP")),
        ({"stop": "😀", "include_stop_str_in_output": True}, ("Paris is 你好 😀", "stop", "😀")),
        ({"stop": "Paris", "min_tokens": 9}, (TEXT, "length", None)),
        ({"stop": "nowhere"}, (TEXT, "length", None)),
        ({"stop": "France!"}, (TEXT, "length", None)),
    ],
)
async def test_stop_strings(stream: bool, options: dict, expected: tuple) -> None:
    async with serving(flow(), MODEL) as site:
        body = {"prompt": "x", "max_tokens": 99, **options}
        if stream:
            chunks = await site.chunks(PATH, body)
            last = chunks[-1]["choices"][0]
            found = (joined(chunks)[0], last["finish_reason"], last["stop_reason"])
        else:
            choice = (await site.post(PATH, body))[1]["choices"][0]
            found = (choice["text"], choice["finish_reason"], choice["stop_reason"])
    assert found == expected
    (made,) = site.flow.streams
    assert made.stopped == ([0] if expected[1] == "stop" else [])
    assert made.num_closed == 1


async def test_tokens_after_a_stop_string_do_not_count() -> None:
    async with serving(flow("a b STOP c d"), MODEL) as site:
        _, body, _ = await site.post(PATH, {"prompt": "x", "stop": "STOP"})
    upto = next(n for n in range(20) if "STOP" in MODEL.decode(MODEL.encode("a b STOP c d")[:n]))
    assert body["usage"]["completion_tokens"] == upto


@given(
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=60), stop=st.sampled_from(["STOP", "你好", "is", " o", "x"])
)
@settings(max_examples=20, deadline=None)
def test_the_answer_does_not_depend_on_how_tokens_are_batched(cuts: list[int], stop: str) -> None:
    tokens = tokens_of(MODEL, TEXT, finish=FinishReason.LENGTH)

    def script(new: NewRequest) -> list:
        steps, start = [], 0
        for size in [*cuts, len(tokens)]:
            if start < len(tokens):
                steps.append(tokens[start : start + size])
            start += size
        return steps

    async def ask() -> tuple[str, dict]:
        async with serving(ScriptedFlow(script), MODEL) as site:
            body = {"prompt": "x", "stop": stop, "stream_options": {"include_usage": True}}
            *chunks, last = await site.chunks(PATH, body)
            return joined(chunks)[0], last["usage"]

    text, usage = asyncio.run(ask())
    assert text == TEXT.partition(stop)[0]
    ids = MODEL.encode(TEXT)
    upto = next((n for n in range(len(ids)) if stop in MODEL.decode(ids[:n])), len(ids))
    assert usage["completion_tokens"] == upto


@pytest.mark.parametrize("include", [False, True])
async def test_the_token_that_ended_it_is_counted_but_not_shown(include: bool) -> None:
    def script(new: NewRequest) -> list:
        tokens = tokens_of(MODEL, "hi!", finish=FinishReason.STOP)
        tokens[-1] = dataclasses.replace(tokens[-1], stop_token=tokens[-1].token)
        return [tokens]

    async with serving(ScriptedFlow(script), MODEL) as site:
        body = {"prompt": "x", "include_stop_str_in_output": include, "stop_token_ids": [MODEL.encode("!")[0]]}
        _, reply, _ = await site.post(PATH, body)
    (choice,) = reply["choices"]
    assert choice["text"] == ("hi!" if include else "hi")
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", MODEL.encode("!")[0])
    assert reply["usage"]["completion_tokens"] == len(MODEL.encode("hi!"))


async def test_special_tokens_are_hidden_unless_asked_for() -> None:
    async with serving(flow("a<|user|>b"), MODEL) as site:
        texts = [
            (await site.post(PATH, {"prompt": "x", "skip_special_tokens": skip}))[1]["choices"][0]["text"]
            for skip in (True, False)
        ]
    assert texts == ["ab", "a<|user|>b"]


async def test_a_generation_error_is_an_error() -> None:
    def script(new: NewRequest) -> list[list[TokenOut]]:
        return [tokens_of(MODEL, "a", finish=FinishReason.ERROR)]

    async with serving(ScriptedFlow(script), MODEL) as site:
        status, body, _ = await site.post(PATH, {"prompt": "x"})
    assert (status, body["error"]["stage"]) == (500, "decoding")


# Echo, ids, log probabilities.


@pytest.mark.parametrize("prompt", ["Hello  <|user|> x", MODEL.encode("Hello world")])
async def test_echo_comes_first(prompt: str | list[int]) -> None:
    shown = prompt if isinstance(prompt, str) else "Hello world"
    async with serving(flow("!"), MODEL) as site:
        body = {"prompt": prompt, "echo": True, "n": 2}
        choices = (await site.post(PATH, body))[1]["choices"]
        assert [choice["text"] for choice in choices] == [f"{shown}!"] * 2
        assert joined(await site.chunks(PATH, body)) == {0: f"{shown}!", 1: f"{shown}!"}


async def test_echo_alone_asks_no_worker() -> None:
    async with serving(flow(), MODEL) as site:
        body = {"prompt": ["a", "bc"], "echo": True, "max_tokens": 0}
        _, reply, _ = await site.post(PATH, body)
        assert [choice["text"] for choice in reply["choices"]] == ["a", "bc"]
        assert {choice["finish_reason"] for choice in reply["choices"]} == {"length"}
        assert reply["usage"]["completion_tokens"] == 0
        *chunks, last = await site.chunks(PATH, {**body, "stream_options": {"include_usage": True}})
        assert joined(chunks) == {0: "a", 1: "bc"}
        assert last["usage"] == reply["usage"]
    assert site.flow.requests == []


async def test_token_ids_on_request() -> None:
    ids = MODEL.encode(TEXT)
    async with serving(flow(), MODEL) as site:
        body = {"prompt": [5, 6], "return_token_ids": True, "stop": "STOP"}
        choice = (await site.post(PATH, body))[1]["choices"][0]
        chunks = [chunk["choices"][0] for chunk in await site.chunks(PATH, body)]
    assert choice["prompt_token_ids"] == chunks[0]["prompt_token_ids"] == [5, 6]
    assert choice["token_ids"] == [token for chunk in chunks for token in chunk["token_ids"]]
    assert choice["token_ids"] == ids[: len(choice["token_ids"])]
    assert all("prompt_token_ids" not in chunk for chunk in chunks[1:])


@pytest.mark.parametrize("as_ids", [False, True])
async def test_logprobs(as_ids: bool) -> None:
    async with serving(flow("Hi 你"), MODEL) as site:
        body = {"prompt": "x", "logprobs": 2, "return_tokens_as_token_ids": as_ids}
        whole = (await site.post(PATH, body))[1]["choices"][0]["logprobs"]
        parts = [chunk["choices"][0]["logprobs"] for chunk in await site.chunks(PATH, body)]
    ids = MODEL.encode("Hi 你")
    names = [f"token_id:{token}" if as_ids else MODEL.token_text(token) for token in ids]
    assert whole["tokens"] == names
    assert whole["token_logprobs"] == [-0.5] * len(ids)
    assert whole["text_offset"] == [len("".join(names[:i])) for i in range(len(ids))]
    assert all(names[i] in top and len(top) <= 3 for i, top in enumerate(whole["top_logprobs"]))
    for key, values in whole.items():
        assert [value for part in parts for value in part[key]] == values


async def test_a_silent_stream_is_kept_alive() -> None:
    gate = asyncio.Event()

    def script(new: NewRequest) -> list:
        return [gate, *saying(MODEL, "hi")(new)]

    settings = RouterSettings(sse_keep_alive_interval=0.01)
    async with (
        serving(ScriptedFlow(script), MODEL, settings) as site,
        site.http.post(PATH, json={"prompt": "x", "stream": True}) as reply,
    ):
        assert await reply.content.readuntil(b"\n\n") == b": keep-alive\n\n"
        gate.set()
        rest = (await reply.read()).decode()
        assert '"text":"hi"' in rest or '"text":"h"' in rest
        assert rest.endswith("data: [DONE]\n\n")
