"""API keys: every path needs one but health probes. Knows ASGI; knows nothing of what is behind the door."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from proto.errors import NotAuthorized, SettingsError
from proto.settings import RouterSettings
from router.openai.errors import reply_for

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/ready"})


def read_keys(settings: RouterSettings) -> tuple[str, ...]:
    """The keys of the settings and of their file, without blank lines. Raises SettingsError."""
    keys = list(settings.api_key)
    if settings.api_key_file is not None:
        try:
            lines = Path(settings.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise SettingsError(f"--api-key-file {settings.api_key_file}: {error}") from error
        keys += [line.strip() for line in lines]
        if not any(line.strip() for line in lines):
            raise SettingsError(f"--api-key-file {settings.api_key_file} holds no key.")
    return tuple(key for key in keys if key)


class ApiKeys:
    """Middleware: refuses requests without a key, with 401, and notes on the others whether they had one.

    Without keys everyone is let in. Preflight requests (OPTIONS) never carry one and are let through.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        authorized = not self._digests or self._has_key(Headers(scope=scope))
        scope.setdefault("state", {})["authorized"] = authorized
        if authorized or scope["method"] == "OPTIONS" or _route_path(scope) in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        error = NotAuthorized("A valid API key is needed: send it as 'Authorization: Bearer <key>'.")
        await reply_for(error, "").response()(scope, receive, send)

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        given = _digest(key.strip().encode("latin-1"))  # as header bytes came in
        # Every key is compared, and digests in constant time: timing tells nothing.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches)


def _route_path(scope: Scope) -> str:
    """The path below the prefix that a proxy may have put before it."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(prefix) :] if prefix and path.startswith(f"{prefix}/") else path


def is_authorized(request: Request) -> bool:
    """Whether the request carried a key, or none is needed."""
    return bool(request.state.authorized)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
