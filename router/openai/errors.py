"""Every failure as OpenAI's error object: ``{"error": {"message", "type", "param", "code"}}``.

Knows which errors may show their message to a client; knows nothing of where they were raised.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, field
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.responses import Response

from proto.errors import LocalFault, NotAuthorized, NotFinite, RemoteFault, SetupError, TandemError, Unavailable

_RETRY_AFTER_S = {429: 1.0, 503: 1.0}
"""Where whoever raised the error knows no better. A request that ran out of time would do so again: 504 has none."""

logger = logging.getLogger(__name__)


class ClientGone(Exception):
    """The client closed its connection before the answer; nobody will read a reply."""

    status = 499


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """What to send for a failure. ``body`` is JSON text, in ASCII whatever the client sent."""

    status: int
    body: str
    headers: dict[str, str] = field(default_factory=dict)

    def response(self) -> Response:
        return Response(self.body, self.status, self.headers, media_type="application/json")


def error_reply(
    status: int,
    kind: str,
    message: str,
    *,
    param: str | None = None,
    stage: str | None = None,
    headers: dict[str, str] | None = None,
) -> ErrorReply:
    error = {"message": message, "type": kind, "param": param, "code": status}
    if stage is not None:
        error["stage"] = stage
    return ErrorReply(status, json.dumps({"error": error}), headers or {})


def reply_for(error: Exception, label: str) -> ErrorReply:
    """The reply that ``error`` deserves. What is our own fault is logged with its traceback and not shown."""
    if isinstance(error, RemoteFault):
        logger.warning("request %s failed: %s", label, error)
        message = f"The workers could not serve this request. The server's log tells more under request id {label}."
        return error_reply(error.status, error.kind, message, stage=error.stage)
    if isinstance(error, TandemError) and not isinstance(error, (LocalFault, SetupError)):
        return _reply_for_tandem(error)
    if isinstance(error, HTTPException):
        phrase = HTTPStatus(error.status_code).phrase
        return error_reply(error.status_code, phrase, error.detail or phrase, headers=dict(error.headers or {}))
    logger.error("request %s failed", label, exc_info=error)
    stage = error.stage if isinstance(error, TandemError) else None
    message = f"Internal server error. The server's log tells more under request id {label}."
    return error_reply(500, "InternalServerError", message, stage=stage)


def _reply_for_tandem(error: TandemError) -> ErrorReply:
    headers: dict[str, str] = {}
    if isinstance(error, NotAuthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, Unavailable):
        wait_s = _RETRY_AFTER_S.get(error.status) if error.retry_after_s is None else error.retry_after_s
        if wait_s is not None:
            headers["Retry-After"] = str(max(math.ceil(wait_s), 1))
    if isinstance(error, NotFinite):
        # OpenAI's clients repeat a 500 otherwise, which would fail everywhere again.
        headers["x-should-retry"] = "false"
    return error_reply(error.status, error.kind, error.message, param=error.param, stage=error.stage, headers=headers)
