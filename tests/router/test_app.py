"""Paths, probes, labels, and one error shape for whatever goes wrong."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
from collections.abc import Sequence

import pytest
from aiohttp import ClientSession

from proto.errors import (
    DeadlineExceeded,
    LocalProtocolError,
    NotSupported,
    NoWorker,
    Overloaded,
    RemoteProtocolError,
    SetupError,
    TandemError,
    WorkerLost,
)
from proto.settings import RouterSettings
from proto.version import __version__
from router.contract import Readiness
from router.openai import serving as openai_serving
from tests.support.http import ScriptedFlow, saying, served_model, serving, tokens_of

MODEL = served_model()
PROMPT = {"model": "tiny", "prompt": "x"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
ENDPOINTS = [("/v1/completions", PROMPT), ("/v1/chat/completions", CHAT)]


def flow() -> ScriptedFlow:
    return ScriptedFlow(saying(MODEL, "hi"))


def assert_error(status: int, body: dict, code: int, kind: str) -> dict:
    assert status == code
    assert set(body) == {"error"}
    error = body["error"]
    assert {"message", "type", "param", "code"} <= set(error) <= {"message", "type", "param", "code", "stage"}
    assert (error["code"], error["type"]) == (code, kind)
    assert error["message"]
    return error


async def test_probes_when_ready_and_when_not() -> None:
    not_ready = Readiness(ready=False, reasons=("no decode worker",), details={"decode_workers": 0})
    for readiness, code in ((None, 200), (not_ready, 503)):
        async with serving(flow(), MODEL, ready=readiness) as site:
            for path in ("/health", "/health/ready", "/ready"):
                status, body, _ = await site.get(path)
                assert status == code
                assert body["reasons"] == list(readiness.reasons if readiness else ())
                assert "decode_workers" in body["details"]
                assert (await site.http.head(path)).status == code
            assert (await site.get("/health/live"))[0] == 200


async def test_version_and_metrics() -> None:
    async with serving(flow(), MODEL) as site:
        assert (await site.get("/version"))[1] == {"version": __version__}
        async with site.http.get("/metrics") as reply:
            assert await reply.text() == "up 1\n"
            assert reply.content_type == "text/plain"


async def test_models_once_per_name() -> None:
    async with serving(flow(), MODEL) as site:
        status, body, _ = await site.get("/v1/models")
        assert status == 200
        assert [card["id"] for card in body["data"]] == ["tiny", "org/tiny-alias"]
        assert body["data"][0]["max_model_len"] == 256
        assert (await site.get("/v1/models/org/tiny-alias"))[1] == body["data"][1]
        status, body, _ = await site.get("/v1/models/none/such")
        assert assert_error(status, body, 404, "NotFoundError")["param"] == "model"


@pytest.mark.parametrize(
    ("method", "path", "code", "kind"),
    [
        ("GET", "/nowhere", 404, "Not Found"),
        ("POST", "/v1/embeddings", 404, "Not Found"),
        ("GET", "/v1/completions", 405, "Method Not Allowed"),
        ("POST", "/v1/models", 405, "Method Not Allowed"),
    ],
)
async def test_routing_errors(method: str, path: str, code: int, kind: str) -> None:
    async with serving(flow(), MODEL) as site, site.http.request(method, path, json={}) as reply:
        assert_error(reply.status, await reply.json(), code, kind)
        assert ("Allow" in reply.headers) == (code == 405)


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        ("GET", "/nowhere", "no /nowhere. GET /docs lists"),
        ("POST", "/chat/completions", "Did you mean /v1/chat/completions?"),
        ("POST", "/v1/v1/models", "no /v1/v1/models. Did you mean /v1/models?"),
        ("POST", "/v1/tokenize", "Did you mean /tokenize?"),
        ("GET", "/metrics/", "Did you mean /metrics?"),
        ("GET", "/v1/completions", "/v1/completions does not take GET; it takes POST."),
        ("GET", "/" + "x" * 5000, "xxx.... GET /docs"),
    ],
)
async def test_a_wrong_path_or_method_is_told_what_is_right(method: str, path: str, words: str) -> None:
    async with serving(flow(), MODEL) as site, site.http.request(method, path, json={}) as reply:
        assert words in (await reply.json())["error"]["message"]


async def test_what_can_be_got_can_be_asked_about() -> None:
    async with serving(flow(), MODEL) as site:
        for path in ("/v1/models", "/v1/models/tiny", "/version", "/metrics", "/ready"):
            async with site.http.head(path) as reply:
                assert (reply.status, await reply.read()) == (200, b"")


async def test_the_docs_can_be_turned_off() -> None:
    for settings, status in ((RouterSettings(), 200), (RouterSettings(disable_fastapi_docs=True), 404)):
        async with serving(flow(), MODEL, settings) as site:
            for path in ("/docs", "/redoc", "/openapi.json"):
                async with site.http.get(path) as reply:
                    assert reply.status == status
            async with site.http.get("/nowhere") as reply:
                assert ("/docs" in await reply.text()) == (status == 200)


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
@pytest.mark.parametrize("name", ["tiny", "org/tiny-alias", None])
async def test_an_answer_bears_the_name_it_was_asked_under(path: str, body: dict, name: str | None) -> None:
    async with serving(flow(), MODEL) as site:
        assert (await site.post(path, {**body, "model": name}))[1]["model"] == (name or "tiny")
        assert {chunk["model"] for chunk in await site.chunks(path, {**body, "model": name})} == {name or "tiny"}


async def test_methods_nobody_knows_make_no_series() -> None:
    async with serving(flow(), MODEL) as site, site.http.request("PROPFIND", "/v1/models") as reply:
        assert reply.status == 405
    assert ("/v1/models", "other", 405) in site.metrics.requests


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "code", "kind", "retry_after"),
    [
        (Overloaded("full", retry_after_s=1.2), 429, "RateLimitError", "2"),
        (NoWorker("none", retry_after_s=0), 503, "ServiceUnavailableError", "1"),
        (NoWorker("none"), 503, "ServiceUnavailableError", "1"),
        (WorkerLost("gone", stage="prefilling"), 503, "ServiceUnavailableError", "1"),
        (DeadlineExceeded("late"), 504, "TimeoutError", None),
        (NotSupported("no"), 501, "NotImplementedError", None),
    ],
)
@pytest.mark.parametrize("when", ["at start", "before the first token"])
async def test_failures_before_the_first_token_are_real_statuses(
    path: str, body: dict, stream: bool, error: TandemError, code: int, kind: str, retry_after: str | None, when: str
) -> None:
    script = error if when == "at start" else [error]
    async with serving(ScriptedFlow(lambda new: script), MODEL) as site:
        status, reply, headers = await site.post(path, {**body, "stream": stream})
        shown = assert_error(status, reply, code, kind)
        assert headers.get("Retry-After") == retry_after
        assert shown.get("stage") == error.stage
        assert all(made.num_closed == 1 for made in site.flow.streams)


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
async def test_failures_after_it_are_the_last_event(path: str, body: dict) -> None:
    def script(new: object) -> list:
        return [tokens_of(MODEL, "a"), WorkerLost("gone", stage="decoding")]

    async with serving(ScriptedFlow(script), MODEL) as site:
        lines = await site.stream(path, body)
        assert lines[-1] == "[DONE]"
        error = json.loads(lines[-2])
        assert_error(503, error, 503, "ServiceUnavailableError")
        assert error["error"]["stage"] == "decoding"
        assert "error" not in json.loads(lines[0])
    assert site.flow.streams[0].num_closed == 1


@pytest.mark.parametrize("error", [LocalProtocolError("secret"), SetupError("secret"), RuntimeError("secret")])
async def test_our_own_faults_are_logged_and_not_shown(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(ScriptedFlow(lambda new: error), MODEL) as site:
        with caplog.at_level(logging.ERROR):
            status, body, headers = await site.post("/v1/completions", PROMPT, **{"X-Request-ID": "mine"})
        shown = assert_error(status, body, 500, "InternalServerError")
        assert "secret" not in shown["message"]
        assert "mine" in shown["message"]
        assert headers["X-Request-ID"] == "mine"
        assert "secret" in caplog.text


async def test_a_workers_fault_is_named_without_its_details(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(ScriptedFlow(lambda new: RemoteProtocolError("10.0.0.3:5 sent junk")), MODEL) as site:
        with caplog.at_level(logging.WARNING):
            status, body, _ = await site.post("/v1/completions", PROMPT)
    assert "10.0.0.3" not in assert_error(status, body, 502, "BadGatewayError")["message"]
    assert "10.0.0.3" in caplog.text


async def test_a_stream_that_ends_too_early_is_our_fault(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(ScriptedFlow(lambda new: [tokens_of(MODEL, "a")]), MODEL) as site:
        with caplog.at_level(logging.ERROR):
            status, body, _ = await site.post("/v1/completions", PROMPT)
        assert_error(status, body, 500, "InternalServerError")
        assert "ended before" in caplog.text


async def test_no_worker_yet() -> None:
    async with serving(flow(), NoWorker("still loading", retry_after_s=5)) as site:
        for status, body, headers in (await site.post("/v1/completions", PROMPT), await site.get("/v1/models")):
            assert_error(status, body, 503, "ServiceUnavailableError")
            assert headers["Retry-After"] == "5"


@pytest.mark.parametrize(("path", "body"), [*ENDPOINTS, ("/tokenize", PROMPT), ("/detokenize", {"tokens": [5]})])
async def test_an_unknown_model_is_named(path: str, body: dict) -> None:
    async with serving(flow(), MODEL) as site:
        status, reply, _ = await site.post(path, {**body, "model": "other"})
        error = assert_error(status, reply, 404, "NotFoundError")
        assert "The model `other` does not exist." in error["message"]
        assert error["param"] == "model"
        status, reply, _ = await site.post(path, {**body, "model": 3})
        assert assert_error(status, reply, 400, "BadRequestError")["param"] == "model"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
async def test_bodies_that_are_no_json(path: str) -> None:
    async with serving(flow(), MODEL) as site:
        for content_type, data in (
            ("application/json", b"{"),
            ("application/json", b"\xff"),
            ("application/x-www-form-urlencoded", b"{}"),
            ("text/plain", b"{}"),
        ):
            async with site.http.post(path, data=data, headers={"Content-Type": content_type}) as reply:
                assert_error(reply.status, await reply.json(), 400, "BadRequestError")
        headers = {"Content-Type": "Application/JSON; charset=utf-8"}
        async with site.http.post("/tokenize", data=b'{"prompt": "x"}', headers=headers) as reply:
            assert reply.status == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
async def test_a_body_that_does_not_come_is_given_up(path: str) -> None:
    async with serving(flow(), MODEL, RouterSettings(request_timeout=0.2)) as site:
        host, _, port = site.base_url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        writer.write(head.encode() + b'{"prompt": ')
        async with asyncio.timeout(30):
            reply = (await reader.read()).decode()  # to the connection's end
        writer.close()
        await writer.wait_closed()
    assert reply.startswith("HTTP/1.1 408 ")
    assert "not received and read within 0.2 s" in reply
    assert (path, "POST", 408) in site.metrics.requests


async def test_a_body_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_serving, "MAX_BODY_BYTES", 1000)

    async def unannounced() -> object:
        for _ in range(20):
            yield b" " * 100

    async with serving(flow(), MODEL) as site:
        status, body, _ = await site.post("/v1/completions", {"prompt": "x" * 2000})
        assert_error(status, body, 413, "Request Entity Too Large")
        headers = {"Content-Type": "application/json"}
        async with site.http.post("/v1/completions", data=unannounced(), headers=headers) as reply:
            assert reply.status == 413


async def test_labels_are_kept_echoed_and_part_of_the_id() -> None:
    async with serving(flow(), MODEL) as site:
        _, body, headers = await site.post("/v1/completions", PROMPT, **{"X-Request-ID": "my-label"})
        assert headers["X-Request-ID"] == "my-label"
        assert body["id"] == "cmpl-my-label"
        assert site.flow.requests[0].label == "my-label"
        for bad in ("x" * 129, "a b", "é"):
            _, body, headers = await site.post("/v1/chat/completions", CHAT, **{"X-Request-ID": bad})
            assert re.fullmatch(r"[0-9a-f]{32}", headers["X-Request-ID"])
            assert body["id"] == f"chatcmpl-{headers['X-Request-ID']}"
        first, second = [(await site.get("/version"))[2]["X-Request-ID"] for _ in range(2)]
        assert first != second


async def test_every_answer_is_counted_under_its_route() -> None:
    async with serving(flow(), MODEL) as site:
        await site.get("/v1/models/tiny")
        await site.get("/nowhere")
        await site.post("/v1/completions", {})
        await site.stream("/v1/chat/completions", CHAT)
    assert site.metrics.requests == [
        ("/v1/models/{model_id:path}", "GET", 200),
        ("unmatched", "GET", 404),
        ("/v1/completions", "POST", 400),
        ("/v1/chat/completions", "POST", 200),
    ]
    assert site.metrics.stages == ["template", "tokenize", "detokenize"]


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_early_ends_its_request(path: str, body: dict, stream: bool) -> None:
    async with serving(ScriptedFlow(lambda new: [asyncio.Event()]), MODEL) as site:
        task = asyncio.create_task(site.post(path, {**body, "stream": stream}))
        await site.flow.started.wait()
        await site.flow.streams[0].waiting.wait()
        task.cancel()
        await site.flow.streams[0].closed.wait()
    assert site.metrics.requests[-1] == (path, "POST", 499)


async def test_a_client_that_leaves_midway_ends_its_request() -> None:
    steps = [tokens_of(MODEL, "a"), asyncio.Event()]
    async with serving(ScriptedFlow(lambda new: steps), MODEL) as site, ClientSession(site.base_url) as http:
        async with http.post("/v1/completions", json={**PROMPT, "stream": True}) as reply:
            await reply.content.readuntil(b"\n\n")
            reply.close()
        await site.flow.streams[0].closed.wait()


# Tokens.


async def test_tokenize_and_back() -> None:
    async with serving(flow(), MODEL) as site:
        status, body, _ = await site.post("/tokenize", {"prompt": "Hello 你好", "return_token_strs": True})
        assert status == 200
        assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
        assert body["max_model_len"] == 256
        assert (await site.post("/detokenize", {"tokens": body["tokens"]}))[1] == {"prompt": "Hello 你好"}
        assert (await site.post("/tokenize", {"prompt": ""}))[1]["tokens"] == []


@pytest.mark.parametrize(("count", "is_aside"), [(10, False), (20_000, True)])
async def test_many_tokens_do_not_hold_up_the_event_loop(
    count: int, is_aside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (token,), threads = MODEL.encode("a"), set()
    decode = MODEL.decode

    def noted(tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        threads.add(threading.get_ident())
        return decode(tokens, skip_special_tokens=skip_special_tokens)

    monkeypatch.setattr(MODEL, "decode", noted)
    async with serving(flow(), MODEL) as site:
        assert (await site.post("/detokenize", {"tokens": [token] * count}))[1] == {"prompt": "a" * count}
    assert threads.isdisjoint({threading.get_ident()}) == is_aside


async def test_tokenize_a_conversation_as_chat_would() -> None:
    async with serving(flow(), MODEL) as site:
        _, body, _ = await site.post("/tokenize", {"messages": CHAT["messages"]})
        text = (await site.post("/detokenize", {"tokens": body["tokens"]}))[1]["prompt"]
        assert text == "<|user|>x<|end|><|assistant|>"
        await site.post("/v1/chat/completions", CHAT)
        assert list(site.flow.requests[0].prompt) == body["tokens"]


async def test_tokenize_shows_tools_without_being_asked_to_call_them() -> None:
    model = served_model(template="{{ tools | tojson }}")
    async with serving(flow(), model) as site:
        _, body, _ = await site.post("/tokenize", {"messages": CHAT["messages"], "tools": [{"type": "function"}]})
    assert model.decode(body["tokens"]) == '[{"type": "function"}]'


async def test_the_api_is_described() -> None:
    async with serving(flow(), MODEL) as site:
        paths = (await site.get("/openapi.json"))[1]["paths"]
    assert "requestBody" in paths["/v1/chat/completions"]["post"]
    assert set(paths) >= {"/v1/completions", "/v1/models", "/tokenize", "/detokenize"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": CHAT["messages"]}),
        ("/tokenize", {"prompt": 3}),
        ("/tokenize", {"prompt": "x", "nonsense": 1}),
        ("/tokenize", {"prompt": "\ud800"}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": ["a"]}),
        ("/detokenize", {"tokens": [420]}),
        ("/detokenize", {"tokens": [1], "nonsense": 1}),
    ],
)
async def test_tokens_requests_that_are_wrong(path: str, body: dict) -> None:
    async with serving(flow(), MODEL) as site:
        status, reply, _ = await site.post(path, body)
        assert_error(status, reply, 400, "BadRequestError")
