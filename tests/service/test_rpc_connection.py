"""Channels and servers: addresses, ports, large messages, TLS, proxies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest

from proto.control import ModelCard
from proto.errors import NoWorker, SettingsError, SetupError
from proto.health import HealthReport, Phase
from proto.settings import RpcSettings
from service.rpc import RouterStream, TlsFiles, WorkerClient, serve, worker_handler
from tests.support.certificates import self_signed

CARD = ModelCard("m", ("m",), "d", 64, 100, (2,), 16, "l", "ns", {"tokenizer.json": bytes(40 << 20)})


def handler() -> grpc.GenericRpcHandler:
    async def describe() -> ModelCard:
        return CARD

    async def health() -> HealthReport:
        return HealthReport(Phase.READY, is_ready=True)

    async def on_stream(stream: RouterStream) -> None:
        raise NoWorker("not in these tests")

    return worker_handler(describe, health, on_stream)


async def test_a_taken_port_is_a_setup_error() -> None:
    server, port = await serve("127.0.0.1", 0, [handler()])
    with pytest.raises(SetupError, match=f"127.0.0.1:{port}"):
        await serve("127.0.0.1", port, [handler()])
    await server.stop(None)


async def test_a_card_with_a_large_tokenizer_fits() -> None:
    server, port = await serve("127.0.0.1", 0, [handler()])
    client = WorkerClient(f"127.0.0.1:{port}")
    assert await client.describe() == CARD
    await client.close()
    await client.close()
    await server.stop(None)


async def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    server, port = await serve("127.0.0.1", 0, [handler()])
    client = WorkerClient(f"127.0.0.1:{port}")
    assert (await client.health()).is_ready
    await client.close()
    await server.stop(None)


@pytest.fixture(scope="session")
def make_certificate(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    return lambda name: self_signed(tmp_path_factory.mktemp(name), name)


async def test_both_sides_prove_who_they_are(make_certificate: Callable[[str], tuple[Path, Path]]) -> None:
    worker, worker_key = make_certificate("worker.tandem")
    router, router_key = make_certificate("router.tandem")
    server, port = await serve(
        "127.0.0.1", 0, [handler()], TlsFiles(certificate=worker, key=worker_key, authority=router)
    )
    known = WorkerClient(
        f"127.0.0.1:{port}", TlsFiles(certificate=router, key=router_key, authority=worker, name="worker.tandem")
    )
    assert (await known.health()).is_ready
    for stranger in (None, TlsFiles(authority=worker, name="worker.tandem"), TlsFiles(authority=router)):
        client = WorkerClient(f"127.0.0.1:{port}", stranger)
        with pytest.raises(NoWorker):
            await client.health(timeout_s=2.0)
        await client.close()
    await known.close()
    await server.stop(None)


def test_missing_tls_files_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "none.pem"
    with pytest.raises(SetupError, match=str(missing)):
        TlsFiles(authority=missing).channel_credentials()
    with pytest.raises(SetupError, match=str(missing)):
        TlsFiles(certificate=missing, key=missing).server_credentials()
    with pytest.raises(SetupError, match="certificate and its key"):
        TlsFiles(authority=missing).server_credentials()


class TestTlsSettings:
    """What --rpc-tls-* make of a process, and what they refuse."""

    def test_without_any_nothing_is_encrypted(self) -> None:
        assert TlsFiles.of(RpcSettings(), is_server=True) is None
        assert TlsFiles.of(RpcSettings(nccl_beside_tls=True), is_server=False) is None

    def test_a_worker_and_a_router_of_one_authority(self, make_certificate: Callable[[str], tuple[Path, Path]]) -> None:
        certificate, key = make_certificate("worker.tandem")
        settings = RpcSettings(
            rpc_tls_cert=str(certificate),
            rpc_tls_key=str(key),
            rpc_tls_ca=str(certificate),
            rpc_tls_name="worker.tandem",
        )
        files = TlsFiles(certificate, key, certificate, "worker.tandem")
        assert TlsFiles.of(settings, is_server=True) == files
        only_checks = RpcSettings(rpc_tls_ca=str(certificate))
        assert TlsFiles.of(only_checks, is_server=False) == TlsFiles(authority=certificate)

    def test_credentials_are_read_once_so_that_connections_can_be_shared(
        self, make_certificate: Callable[[str], tuple[Path, Path]]
    ) -> None:
        certificate, _ = make_certificate("worker.tandem")
        first, second = TlsFiles(authority=certificate), TlsFiles(authority=certificate)
        assert first.channel_credentials() is second.channel_credentials()

    @pytest.mark.parametrize(
        ("given", "hint"),
        [
            ({"rpc_tls_cert": "c.pem"}, "go together"),
            ({"rpc_tls_key": "k.pem", "rpc_tls_ca": "a.pem"}, "go together"),
            ({"rpc_tls_ca": "a.pem"}, "needs --rpc-tls-cert"),
            ({"rpc_tls_name": "worker.tandem"}, "give --rpc-tls-ca"),
        ],
    )
    def test_half_of_it_is_refused(self, given: dict[str, str], hint: str) -> None:
        with pytest.raises(SettingsError, match=hint):
            TlsFiles.of(RpcSettings(**given), is_server=True)  # type: ignore[arg-type]

    def test_a_missing_file_is_told_at_the_start(self, tmp_path: Path) -> None:
        missing = str(tmp_path / "none.pem")
        for given in ({"rpc_tls_ca": missing}, {"rpc_tls_cert": missing, "rpc_tls_key": missing}):
            with pytest.raises(SetupError, match="none"):
                TlsFiles.of(RpcSettings(**given), is_server="rpc_tls_cert" in given)  # type: ignore[arg-type]
