"""HTTP within a running event loop: an embedded server for any ASGI app, and the small one that every worker has.

    /health       200 when ready, else 503        /health/live   200 while the process answers
    /ready        the same, with the report       /metrics       Prometheus' text format

The web libraries are imported when a server is made, so that a worker without an HTTP port does without them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proto.errors import SetupError
from proto.health import HealthReport, Phase

if TYPE_CHECKING:
    import uvicorn
    from starlette.requests import Request
    from starlette.responses import Response

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]
"""ASGI's own shape, whose messages are dictionaries."""


class HttpServer:
    """``start`` once; ``stop`` at any time. Leaves the process's signals alone."""

    def __init__(
        self,
        app: AsgiApp,
        host: str,
        port: int,
        *,
        certificate: Path | None = None,
        key: Path | None = None,
        root_path: str = "",
    ) -> None:
        self._app = app
        self._host = host
        self._asked_port = port
        self._certificate = certificate
        self._key = key
        self._root_path = root_path
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self._port = 0

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._port

    async def start(self) -> None:
        """From here on connections are taken. Raises SetupError when the port is taken or a TLS file is missing."""
        listener = _listen(self._host, self._asked_port)
        self._port = listener.getsockname()[1]
        try:
            self._server = self._build()
        except OSError as error:
            listener.close()
            raise SetupError(f"cannot use the TLS key or certificate: {error}") from error
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]), name="http server")

    def _build(self) -> uvicorn.Server:
        import uvicorn

        class Embedded(uvicorn.Server):
            @contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield

        config = uvicorn.Config(
            self._app,
            ssl_certfile=str(self._certificate) if self._certificate else None,
            ssl_keyfile=str(self._key) if self._key else None,
            root_path=self._root_path,
            log_config=None,
            access_log=False,
            server_header=False,
        )
        config.load()
        return Embedded(config)

    async def wait(self) -> None:
        """Returns, or raises, when the server ends."""
        assert self._serving is not None, "start() comes first"
        await asyncio.shield(self._serving)

    async def stop(self, timeout_s: float = 5.0) -> None:
        """Takes no more connections; those not answered within ``timeout_s`` are broken off. Idempotent."""
        if self._server is None or self._serving is None:
            return
        self._server.config.timeout_graceful_shutdown = timeout_s  # type: ignore[assignment]  # any number will do
        self._server.should_exit = True
        await asyncio.wait({self._serving})
        if broken_off := self._server.server_state.tasks:
            await asyncio.wait(broken_off)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that a taken port is known at once and an early client waits instead of being refused."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise SetupError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


def worker_app(report: Callable[[], HealthReport], metrics: Callable[[], tuple[bytes, str]]) -> AsgiApp:
    """The worker's probes and metrics. ``metrics`` returns (page, content type)."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    async def health(_request: Request) -> Response:
        now = report()
        return PlainTextResponse("" if now.is_ready else now.detail or now.phase.value, 200 if now.is_ready else 503)

    async def live(_request: Request) -> Response:
        return PlainTextResponse("", 503 if report().phase is Phase.FAILED else 200)

    async def ready(_request: Request) -> Response:
        now = report()
        body = {**dataclasses.asdict(now), "phase": now.phase.value}
        return JSONResponse(body, 200 if now.is_ready else 503)

    async def page(_request: Request) -> Response:
        body, content_type = metrics()
        return Response(body, headers={"content-type": content_type})

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/health/live", live),
            Route("/ready", ready),
            Route("/metrics", page),
        ]
    )
