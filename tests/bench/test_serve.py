"""The whole command against servers that answer by script. What took how long is never asserted."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from bench import command
from bench.options import read_serve
from bench.serve import serve
from proto.errors import NoWorker, SettingsError
from tests.bench.scripted import Reply, Scripted, completion, obliging, scripted, usage

SHORT = ("--num-prompts", "5", "--random-input-len", "6", "--random-output-len", "3")


async def bench(server: Scripted, *flags: str, key: str = "") -> tuple[int, str, list[str]]:
    """(exit status, what was printed, notes)."""
    said: list[str] = []
    notes: list[str] = []
    settings = read_serve(["--base-url", server.url, *SHORT, *flags], {"TANDEM_API_KEY": key})
    status = await serve(settings, said.append, notes.append)
    return status, "\n".join(said), notes


def rows(text: str) -> dict[str, str]:
    return {
        label: value.strip() for label, colon, value in (line.partition(":") for line in text.splitlines()) if colon
    }


async def test_a_run_sends_what_was_asked_for_and_counts_what_the_server_counts() -> None:
    async with scripted(obliging) as server:
        server.tokens = [11, 12, 13]
        status, text, notes = await bench(server, "--ignore-eos", "--extra-body", '{"top_k": 1}', key="secret")
    assert status == 0
    found = rows(text)
    assert (found["Successful requests"], found["Failed requests"]) == ("5", "0")
    assert (found["Total input tokens"], found["Of which were cached"]) == ("30", "10")
    assert found["Total generated tokens"] == "15"
    assert "Answers shorter than asked for" not in found
    assert notes[0] == "Prompts are made of 3 token ids from the server's /tokenize."
    assert server.keys == ["Bearer secret"] * 5
    for body in server.bodies:
        prompt = body.pop("prompt")
        assert isinstance(prompt, list)
        assert len(prompt) == 6
        assert set(prompt) <= {11, 12, 13}
        assert body == {
            "model": "scripted",
            "max_tokens": 3,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "top_k": 1,
        }


async def test_two_runs_of_one_seed_send_the_same() -> None:
    sent: list[list[str]] = []
    for seed in ("1", "1", "2"):
        async with scripted(obliging) as server:
            await bench(server, "--seed", seed)
            sent.append(sorted(json.dumps(body) for body in server.bodies))
    assert sent[0] == sent[1] != sent[2]


async def test_chat_sends_messages() -> None:
    async with scripted(obliging) as server:
        status, text, _ = await bench(server, "--backend", "openai-chat", "--model", "m")
    assert status == 0
    assert rows(text)["Total generated tokens"] == "15"
    for body in server.bodies:
        messages = body["messages"]
        assert isinstance(messages, list)
        assert len(messages[0]["content"].split()) == 6
        assert (body["model"], body["max_completion_tokens"]) == ("m", 3)


async def test_warm_ups_are_sent_first_and_not_measured() -> None:
    async with scripted(obliging) as plain, scripted(obliging) as warmed:
        await bench(plain, "--max-concurrency", "1")
        _, text, _ = await bench(warmed, "--max-concurrency", "1", "--num-warmups", "2")
    assert rows(text)["Successful requests"] == "5"
    assert warmed.bodies[2:] == plain.bodies
    assert all(body not in plain.bodies for body in warmed.bodies[:2])


async def test_failures_of_every_kind_are_counted_and_shown() -> None:
    replies = iter(
        [
            Reply(status=429, body='{"error": {"message": "queue is full"}}'),
            Reply(status=500, body="Internal Server Error"),
            Reply([completion("a"), {"error": {"message": "worker lost"}}]),
            Reply([completion("a"), None]),
            Reply([completion("a")]),
            Reply(["{half"]),
            Reply([completion("a"), completion("b", "stop"), usage(6, 2), "[DONE]"]),
        ]
    )

    def script(body: Mapping[str, object]) -> Reply:
        return next(replies)

    async with scripted(script) as server:
        status, text, _ = await bench(server, "--num-prompts", "7", "--ignore-eos", "--max-concurrency", "1")
    assert status == 0
    found = rows(text)
    assert (found["Successful requests"], found["Failed requests"]) == ("1", "6")
    assert (found["Total input tokens"], found["Total generated tokens"]) == ("6", "2")
    assert found["Answers shorter than asked for"] == "1"
    shown = [line.split(" x ")[1] for line in text.splitlines() if " x " in line]
    assert shown[:3] == ["429: queue is full", "500: Internal Server Error", "worker lost"]
    assert shown[3].strip()  # how a cut connection is worded is aiohttp's business
    assert shown[4:] == ["the stream ended without a finish reason"]
    assert "and 1 more" in text


async def test_what_is_no_event_stream_is_a_failure() -> None:
    async with scripted(lambda body: Reply(["{half"])) as server:
        status, text, _ = await bench(server)
    assert status == 1
    assert "5 x not an event stream" in text


async def test_no_success_at_all_is_a_failure_of_the_command() -> None:
    async with scripted(lambda body: Reply(status=503, body="{}")) as server:
        status, text, _ = await bench(server)
    assert status == 1
    assert "5 x 503: Service Unavailable" in text


async def test_two_servers_take_turns_with_the_same_prompts(tmp_path: Path) -> None:
    order: list[str] = []

    def of(name: str) -> Callable[[Mapping[str, object]], Reply]:
        def script(body: Mapping[str, object]) -> Reply:
            order.append(name)
            return obliging(body)

        return script

    async with scripted(of("A")) as a, scripted(of("B")) as b:
        b.models = ("other",)
        flags = ("--num-prompts", "2", "--rounds", "3", "--save-result", "--result-dir", str(tmp_path / "new"))
        status, text, _ = await bench(a, "--versus", b.url, "--result-filename", "r.json", *flags)
    assert status == 0
    assert "".join(order) == "AABBBBAAAABB"
    assert {str(body["prompt"]) for body in a.bodies} == {str(body["prompt"]) for body in b.bodies}
    assert len({str(body["prompt"]) for body in a.bodies}) == 6
    assert {body["model"] for body in b.bodies} == {"other"}
    assert "B / A" in text
    first, second = (json.loads((tmp_path / "new" / name).read_text()) for name in ("r.json", "r.versus.json"))
    assert (first["base_url"], second["base_url"]) == (a.url, b.url)
    assert (first["completed"], second["completed"], first["rounds"]) == (6, 6, 3)


async def test_a_custom_dataset_starts_over_when_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one", "output_tokens": 2}\n{"prompt": "two"}\n')
    async with scripted(obliging) as server:
        flags = ("--dataset-name", "custom", "--dataset-path", str(path), "--custom-output-len", "4")
        await bench(server, *flags, "--max-concurrency", "1", "--num-prompts", "3")
    assert [(body["prompt"], body["max_tokens"]) for body in server.bodies] == [("one", 2), ("two", 4), ("one", 2)]


async def test_token_ids_cannot_be_chatted(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": [1, 2]}\n')
    async with scripted(obliging) as server:
        with pytest.raises(SettingsError, match="cannot be a message"):
            await bench(server, "--backend", "openai-chat", "--dataset-name", "custom", "--dataset-path", str(path))


async def test_a_server_that_is_not_there_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(NoWorker, match="Cannot reach"):
        await serve(read_serve(["--port", str(port), *SHORT], {}), print, print)


async def test_a_server_that_is_not_up_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.client._READY_PAUSE_S", 0.01)
    async with scripted(obliging) as server:
        server.num_not_ready = 3
        with pytest.raises(NoWorker, match="503: loading"):
            await bench(
                server, "--vocab-size", "9", "--num-prompts", "1", "--model", "m", "--ready-check-timeout-sec=0.001"
            )
        assert not server.bodies
        flags = ("--vocab-size", "9", "--num-prompts", "1", "--ready-check-timeout-sec", "60")
        assert (await bench(server, *flags))[0] == 0


async def test_headers_go_with_every_request() -> None:
    async with scripted(obliging) as server:
        flags = ("--vocab-size", "9", "--num-prompts", "2", "--header", "X-Tenant=a=b", "authorization=Basic x")
        await bench(server, *flags, key="ours")
    assert set(server.tenants) == {"a=b"}
    assert set(server.keys) == {"Basic x"}, "what is asked for by name wins"


async def test_a_server_without_models_wants_a_name() -> None:
    async with scripted(obliging) as server:
        server.models = ()
        with pytest.raises(NoWorker, match="give --model"):
            await bench(server)


def test_the_commands_surface(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command.main([]) == 2
    assert command.main(["--help"]) == 0
    with pytest.raises(SettingsError, match="serve, compare, checkpoint, chaos and gpu"):
        command.main(["frob"])
    path = tmp_path / "a.json"
    path.write_text('{"request_throughput": 2.0}')
    capsys.readouterr()
    assert command.main(["compare", str(path), str(path)]) == 0
    assert "1.00" in capsys.readouterr().out


def test_help_loads_no_client() -> None:
    code = (
        "import sys\nfrom tandem.cli import main\n"
        "try:\n    main(['bench', 'serve', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(len({'aiohttp', 'asyncio', 'torch', 'numpy', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--burstiness" in done.stdout
