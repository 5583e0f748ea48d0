"""What each local process is told, and how the stack comes up and goes down, with stand-ins for the tiers."""

from __future__ import annotations

import asyncio
import io
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kvtransfer.ledger.records import WorkerRecord
from proto.control import Role
from proto.errors import SetupError
from proto.ids import Epoch, WorkerId
from proto.settings import CacheSettings, LedgerSettings, LogSettings, ModelSettings, RouterSettings, WorkerSettings
from tandem import options
from tandem.local import LocalStack, Ready, StackSettings, child_groups, print_line
from tandem.local_redis import LocalRedis
from tandem.machine import Machine
from tandem.options import ROUTER, SERVE, WORKER, Resolved, build_parser, resolve
from tests.support.redis import free_port


def stack_settings(*argv: str) -> StackSettings:
    given = build_parser(SERVE, "tandem serve", "").read(["some/model", *argv])
    resolved = resolve(SERVE, given, {})
    return StackSettings.of(resolved, resolved.engine())


def as_child_reads(environ: dict[str, str], scope: options.Scope) -> Resolved:
    return resolve(scope, build_parser(scope, "tandem", "").read([]), environ)


def test_children_are_stopped_router_first() -> None:
    groups = child_groups(stack_settings("--prefill", "2", "--decode", "3"), Machine(4), is_private=True)
    assert [[spec.name for spec in group] for group in groups] == [
        ["router"],
        ["prefill-0", "prefill-1"],
        ["decode-0", "decode-1", "decode-2"],
    ]


def test_no_prefill_worker_is_a_stack_too() -> None:
    groups = child_groups(stack_settings("--prefill", "0"), Machine(4), is_private=True)
    assert [[spec.name for spec in group] for group in groups] == [["router"], [], ["decode-0"]]


def test_a_worker_reads_its_settings_from_its_environment() -> None:
    settings = stack_settings("--block-size", "32", "--max-held=7", "--log-format=json", "--namespace=x", "--port=9")
    settings = replace(settings, ledger=replace(settings.ledger, redis="unix:///r"))
    _, (prefill,), (decode,) = child_groups(settings, Machine(8), is_private=True)
    for spec in (prefill, decode):
        read = as_child_reads(dict(spec.environ), WORKER)
        assert read.get(ModelSettings) == ModelSettings(model="some/model", threads=4)
        assert read.get(CacheSettings).block_size == 32
        assert read.get(LedgerSettings) == LedgerSettings(redis="unix:///r", namespace="x")
        assert read.get(LogSettings).log_format == "json"
        assert read.get(WorkerSettings) == WorkerSettings(
            host="127.0.0.1", advertise="127.0.0.1", http_port=0, worker_id=spec.name, max_held=7
        )
        assert read.warnings == ()
    assert prefill.argv[-3:] == ("-m", "tandem", "prefill")
    assert decode.argv[-1] == "decode"


def test_the_router_reads_its_settings_from_its_environment() -> None:
    settings = stack_settings(
        *("--port", "9", "--lease-s", "7", "--disagg-threshold", "5"),
        *("--generation-config", "vllm", "--prefix-hash-key=salt"),
    )
    ((router,), _, _) = child_groups(settings, Machine(8), is_private=True)
    read = as_child_reads(dict(router.environ), ROUTER)
    assert read.get(RouterSettings) == RouterSettings(port=9, disagg_threshold=5, lease_s=7.0)
    assert read.get(ModelSettings).generation_config == "vllm"
    assert read.get(CacheSettings).prefix_hash_key == "salt"


def test_secrets_travel_by_environment_to_those_who_need_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "stale")
    monkeypatch.setenv("TANDEM_PORT", "1")
    settings = stack_settings("--api-key", "hush", "--prefix-hash-key=salt")
    (router,), (prefill,), (decode,) = child_groups(settings, Machine(2), is_private=True)
    assert as_child_reads(dict(router.environ), ROUTER).get(RouterSettings).api_key == ("hush",)
    for spec in (prefill, decode):
        assert "hush" not in spec.environ.values()
        assert as_child_reads(dict(spec.environ), WORKER).get(CacheSettings).prefix_hash_key == "salt"
    for spec in (router, prefill, decode):
        assert "hush" not in " ".join(spec.argv)
        assert "VLLM_API_KEY" not in spec.environ, "what the parent has read is passed on under one name only"
        assert spec.environ["PATH"] == os.environ["PATH"]


def test_on_a_shared_ledger_workers_can_be_reached_and_have_unique_names() -> None:
    settings = stack_settings()
    one, other = (child_groups(settings, Machine(2), is_private=False)[1][0] for _ in range(2))
    assert one.name == other.name == "prefill-0"
    assert one.environ["TANDEM_WORKER_ID"] != other.environ["TANDEM_WORKER_ID"]
    read = as_child_reads(dict(one.environ), WORKER).get(WorkerSettings)
    assert (read.host, read.advertise) == ("0.0.0.0", None)


@pytest.mark.parametrize("host", ["10.0.0.2", "pod-7", "fd00::2"])
def test_on_a_shared_ledger_workers_go_by_the_host_that_is_told(host: str) -> None:
    settings = stack_settings("--redis", "redis://10.0.0.1", "--advertise", host)
    _, (prefill,), (decode,) = child_groups(settings, Machine(2), is_private=False)
    for spec in (prefill, decode):
        read = as_child_reads(dict(spec.environ), WORKER).get(WorkerSettings)
        assert (read.host, read.advertise, read.port) == ("0.0.0.0", host, 0)


def test_a_childs_line_that_cannot_be_written_harms_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    print_line("router", "up")
    print_line("router", '{"message": "up"}')
    assert capsys.readouterr().err == 'router     | up\n{"process": "router", "message": "up"}\n'
    reader, writer = os.pipe()
    os.close(reader)  # as good as a full disk, on every system
    with open(writer, "wb", buffering=0) as broken, io.TextIOWrapper(broken, write_through=True) as stream:
        monkeypatch.setattr("sys.stderr", stream)
        print_line("router", "nobody reads this")
        with pytest.raises(BrokenPipeError):
            stream.write("nor this")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file on a disk that is full is Linux's")
def test_ready_that_cannot_be_told_harms_nobody() -> None:
    program = """
from types import SimpleNamespace
from tandem.local import Ready, print_ready

worker = SimpleNamespace(worker="d", address="a", http_address=None, num_blocks=1, block_size=1, model="m")
print_ready(Ready("http://x", (worker,)))
"""
    told = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert told.stdout.startswith("Ready: http://x")
    with open("/dev/full", "w") as full:
        subprocess.run([sys.executable, "-c", program], stdout=full, check=True)


def test_ready_is_told_in_words() -> None:
    record = WorkerRecord(
        worker=WorkerId("decode-0"),
        role=Role.DECODE,
        epoch=Epoch("e"),
        address="127.0.0.1:5",
        http_address="127.0.0.1:6",
        layout="l",
        numerics="n",
        model="tiny",
        model_digest="d",
        block_size=16,
        num_blocks=1000,
    )
    text = Ready("http://127.0.0.1:8000/v1", (record,)).describe()
    assert "Ready: http://127.0.0.1:8000/v1  (model tiny)" in text
    assert "decode-0  127.0.0.1:5  16,000 tokens of KV cache  http://127.0.0.1:6/metrics\n" in text


@pytest.mark.parametrize(
    ("argv", "url"),
    [
        ((), "http://127.0.0.1:8000/v1"),
        (("--host", "10.1.2.3", "--port", "9"), "http://10.1.2.3:9/v1"),
        (("--host", "::1", "--root-path", "/llm"), "http://[::1]:8000/llm/v1"),
        (("--ssl-certfile", "c.pem"), "https://127.0.0.1:8000/v1"),
    ],
)
def test_the_url_that_clients_use(argv: tuple[str, ...], url: str) -> None:
    stack = LocalStack(stack_settings(*argv), Machine(1), say=lambda name, line: None, on_ready=lambda ready: None)
    assert stack.url == url


def test_port_zero_is_settled_before_anybody_is_told() -> None:
    stack = LocalStack(stack_settings("--port", "0"), Machine(1), say=lambda name, line: None, on_ready=lambda r: None)
    assert 0 < int(stack.url.split(":")[2].removesuffix("/v1")) < 65536


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (("--model-path", "/nonexistent/model", "--port", "0"), "There is no folder /nonexistent/model"),
        (("--tokenizer", "nothing", "--port", "0"), "There is no folder nothing"),
        (("--host", "203.0.113.1", "--port", "80"), r"cannot listen on 203\.0\.113\.1:80"),
        (("--redis", "redis://r", "--advertise", "pod-7:9000"), "a host alone here, .* got 'pod-7:9000'"),
        (("--advertise", "pod-7"), "give --redis URL, or leave it out"),
    ],
)
async def test_what_is_plainly_wrong_is_told_before_anything_is_started(argv: tuple[str, ...], why: str) -> None:
    given = build_parser(SERVE, "tandem serve", "").read(list(argv))
    resolved = resolve(SERVE, given, {})
    settings = StackSettings.of(resolved, resolved.engine())
    stack = LocalStack(settings, Machine(1), say=lambda name, line: None, on_ready=lambda ready: None)
    with pytest.raises(SetupError, match=why):
        await stack.start()
    await stack.stop()


async def test_a_taken_port_is_told_before_anything_is_started() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = stack_settings("--host", "127.0.0.1", "--port", str(port))
        stack = LocalStack(settings, Machine(1), say=lambda name, line: None, on_ready=lambda ready: None)
        with pytest.raises(SetupError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            await stack.start()
    await stack.stop()


async def test_a_redis_that_does_not_let_in_ends_the_stack_with_its_reason(tmp_path: Path) -> None:
    port = free_port()
    async with LocalRedis(port=port):
        settings = stack_settings("--port", "0", "--device", "cpu", "--redis", f"redis://:wrong@127.0.0.1:{port}/0")
        model = replace(settings.engine.model, model=str(tmp_path))
        settings = replace(settings, engine=replace(settings.engine, model=model))
        stack = LocalStack(settings, Machine(1), say=lambda name, line: None, on_ready=lambda ready: None)
        await stack.start()
        try:
            async with asyncio.timeout(120):
                with pytest.raises(SetupError, match="cannot start: Redis wants another user or password in its URL"):
                    await stack.run()
        finally:
            await stack.stop()


async def test_a_model_that_does_not_load_ends_the_stack_with_its_reason(tmp_path: Path) -> None:
    said: list[tuple[str, str]] = []
    settings = stack_settings("--port", "0", "--device", "cpu", "--drain-timeout", "1")
    model = replace(settings.engine.model, model=str(tmp_path))
    settings = replace(settings, engine=replace(settings.engine, model=model))
    stack = LocalStack(
        settings, Machine(1), say=lambda name, line: said.append((name, line)), on_ready=lambda ready: None
    )
    await stack.start()
    try:
        async with asyncio.timeout(120):
            with pytest.raises(SetupError, match=rf"^(prefill|decode)-0 cannot start: (?!error: ).*{tmp_path}"):
                await stack.run()
    finally:
        await stack.stop()
    assert [child.pid for child in stack.supervisor.children] == [None, None, None]
