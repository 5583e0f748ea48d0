"""Channels and servers: message size, keepalive, reconnection and TLS, the same for every tier.

Knows nothing of the services that run over them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from proto.errors import SettingsError, SetupError
from proto.settings import RpcSettings
from proto.wire import MAX_MESSAGE_BYTES
from service.address import join_address

_SLACK_BYTES = 1 << 20
"""Our own limit answers first, with a better message than gRPC's."""

SILENCE_S = 10.0
"""How long a peer may give no sign of life: one whose machine is gone, or that is stopped, closes no connection."""

_COMMON: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES + _SLACK_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES + _SLACK_BYTES),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
_CHANNEL: tuple[tuple[str, int], ...] = (
    *_COMMON,
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),  # also what one connection attempt may take
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
_SERVER: tuple[tuple[str, int], ...] = (
    *_COMMON,
    ("grpc.so_reuseport", 0),  # a port that is taken is an error, not a coin toss between two servers
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
)


def _keepalive(silence_s: float) -> tuple[tuple[str, int], ...]:
    """A ping after half of ``silence_s``, and the other half to answer it."""
    half_ms = round(silence_s * 500)
    return (
        ("grpc.keepalive_time_ms", half_ms),
        ("grpc.keepalive_timeout_ms", half_ms),
        ("grpc.http2.ping_timeout_ms", half_ms),  # outlasts the line above in newer gRPC: a minute by default
    )


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. ``authority`` signs the other side's certificate: a server that has it demands one of its clients.

    ``name``: the name in the server's certificate, where clients reach it by another one (an IP address, say).
    """

    certificate: Path | None = None
    key: Path | None = None
    authority: Path | None = None
    name: str | None = None

    @classmethod
    def of(cls, settings: RpcSettings, *, is_server: bool) -> TlsFiles | None:
        """What the settings ask for; None where that is no encryption. Raises SettingsError, and SetupError at once
        where a file is missing."""
        given = (settings.rpc_tls_cert, settings.rpc_tls_key, settings.rpc_tls_ca)
        certificate, key, authority = (Path(name) if name else None for name in given)
        if (certificate is None) != (key is None):
            raise SettingsError("--rpc-tls-cert and --rpc-tls-key go together: a certificate is of use with its key.")
        if certificate is None and authority is None:
            if settings.rpc_tls_name:
                raise SettingsError("--rpc-tls-name is for encrypted connections: give --rpc-tls-ca, too.")
            return None
        files = cls(certificate, key, authority, settings.rpc_tls_name or None)
        if is_server:
            if certificate is None:
                raise SettingsError("A worker with --rpc-tls-ca needs --rpc-tls-cert and --rpc-tls-key, too.")
            files.server_credentials()
        files.channel_credentials()
        return files

    def server_credentials(self) -> grpc.ServerCredentials:
        """Raises SetupError when a file is missing."""
        if self.certificate is None or self.key is None:
            raise SetupError("a TLS server needs a certificate and its key")
        return grpc.ssl_server_credentials(
            [(_read(self.key), _read(self.certificate))],
            root_certificates=_read(self.authority) if self.authority else None,
            require_client_auth=self.authority is not None,
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Raises SetupError when a file is missing. Read once: a connection is shared by equal credentials only."""
        return _channel_credentials(self)


@functools.lru_cache(maxsize=8)
def _channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        root_certificates=_read(files.authority) if files.authority else None,
        private_key=_read(files.key) if files.key else None,
        certificate_chain=_read(files.certificate) if files.certificate else None,
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SetupError(f"cannot read the TLS file {path}: {error.strerror}") from error


def channel(address: str, tls: TlsFiles | None = None, silence_s: float = SILENCE_S) -> grpc.aio.Channel:
    """A channel to ``address`` (host:port). It connects when first used, and again after a loss.

    Channels to one address share one connection, so one may be made per use; each is closed by whoever made it.
    """
    options = (*_CHANNEL, *_keepalive(silence_s))
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    named = (("grpc.ssl_target_name_override", tls.name),) if tls.name else ()
    return grpc.aio.secure_channel(address, tls.channel_credentials(), options=(*options, *named))


async def serve(
    host: str,
    port: int,
    handlers: Sequence[grpc.GenericRpcHandler],
    tls: TlsFiles | None = None,
    silence_s: float = SILENCE_S,
) -> tuple[grpc.aio.Server, int]:
    """A started server and its port (``port`` 0: any free one). Raises SetupError when it cannot listen."""
    server = grpc.aio.server(options=(*_SERVER, *_keepalive(silence_s)))
    server.add_generic_rpc_handlers(tuple(handlers))
    address = join_address(host, port)
    try:
        if tls is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, tls.server_credentials())
    except RuntimeError as error:
        raise SetupError(f"cannot listen on {address}: is the port taken?") from error
    await server.start()
    return server, bound
