"""Every path needs a key but the health probes, and every refusal is an error object."""

from __future__ import annotations

from pathlib import Path

import pytest

from proto.errors import SettingsError
from proto.settings import RouterSettings
from router.auth import read_keys
from tests.support.http import ScriptedFlow, saying, served_model, serving

MODEL = served_model()
KEYS = RouterSettings(api_key=("first", "sécond"))


def flow() -> ScriptedFlow:
    return ScriptedFlow(saying(MODEL, "hi"))


@pytest.mark.parametrize(
    "path", ["/v1/models", "/metrics", "/version", "/openapi.json", "/nowhere", "/health/other", "/health/../metrics"]
)
async def test_a_path_without_key_is_refused(path: str) -> None:
    async with serving(flow(), MODEL, KEYS) as site:
        status, body, headers = await site.get(path)
    assert status == 401
    assert body["error"]["type"] == "AuthenticationError"
    assert body["error"]["code"] == 401
    assert headers["WWW-Authenticate"] == "Bearer"
    assert headers["X-Request-ID"]


@pytest.mark.parametrize(
    "header", ["Bearer wrong", "Bearer", "Bearer ", "Basic first", "first", "Bearer first x", "Bearer fi\u00ff"]
)
async def test_a_wrong_key_is_refused(header: str) -> None:
    async with serving(flow(), MODEL, KEYS) as site:
        assert (await site.get("/v1/models", Authorization=header))[0] == 401


@pytest.mark.parametrize("header", ["Bearer first", "bearer first", "BEARER  first", "Bearer sécond"])
async def test_any_of_the_keys_opens(header: str) -> None:
    async with serving(flow(), MODEL, KEYS) as site:
        assert (await site.get("/v1/models", Authorization=header))[0] == 200


async def test_probes_need_no_key_but_details_do() -> None:
    async with serving(flow(), MODEL, KEYS) as site:
        for path in ("/health", "/health/live", "/health/ready", "/ready"):
            status, body, _ = await site.get(path)
            assert status == 200
            assert "details" not in body
        assert (await site.get("/ready", Authorization="Bearer first"))[1]["details"] == {"decode_workers": 1}


async def test_a_refused_request_is_never_started() -> None:
    async with serving(flow(), MODEL, KEYS) as site:
        assert (await site.post("/v1/completions", {"prompt": "x"}))[0] == 401
        assert site.flow.requests == []


async def test_preflight_needs_no_key_and_refusals_can_be_read_across_origins() -> None:
    settings = RouterSettings(api_key=("first",), allowed_origins=("https://app.example",))
    async with serving(flow(), MODEL, settings) as site:
        origin = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        async with site.http.options("/v1/completions", headers=origin) as reply:
            assert reply.status == 200
            assert reply.headers["Access-Control-Allow-Origin"] == "https://app.example"
        status, _, headers = await site.get("/v1/models", Origin="https://app.example")
        assert status == 401
        assert headers["Access-Control-Allow-Origin"] == "https://app.example"
        async with site.http.options("/v1/completions", headers={**origin, "Origin": "https://evil.example"}) as reply:
            assert "Access-Control-Allow-Origin" not in reply.headers


@pytest.mark.parametrize("server_root_path", ["", "/llm"], ids=["app-only", "server-too"])
async def test_a_proxys_path_prefix_opens_nothing_else(server_root_path: str) -> None:
    settings = RouterSettings(api_key=("first",), root_path="/llm")
    async with serving(flow(), MODEL, settings, server_root_path=server_root_path) as site:
        assert (await site.get("/llm/health"))[0] == 200
        assert (await site.get("/health"))[0] == 200
        assert (await site.get("/v1/models"))[0] == 401
        assert (await site.get("/other/health"))[0] == 401
        assert (await site.get("/llm/v1/models"))[0] == 401
        assert (await site.get("/llm/v1/models", Authorization="Bearer first"))[0] == 200


def test_keys_come_from_settings_and_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("a\n\n  b  \n")
    assert read_keys(RouterSettings(api_key=("c", ""), api_key_file=str(file))) == ("c", "a", "b")
    assert read_keys(RouterSettings()) == ()


def test_a_key_file_that_opens_the_door_by_accident_is_an_error(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    for path in (empty, tmp_path / "missing"):
        with pytest.raises(SettingsError, match="--api-key-file"):
            read_keys(RouterSettings(api_key_file=str(path)))
