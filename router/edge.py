"""The outermost layer of the HTTP side: a label for every request, an error object for every failure, a metric for
every answer. Knows ASGI; knows no endpoint."""

from __future__ import annotations

import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.contract import MetricsLike
from router.openai.errors import ClientGone, reply_for

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_LABEL = re.compile(r"[\x21-\x7e]{1,128}")


class Edge:
    """Middleware. Puts ``label`` into the scope's state, and X-Request-ID onto every response.

    A client's X-Request-ID is kept if it is printable ASCII of at most 128 characters; otherwise it gets a new one.
    Paths below ``root_path`` are found with and without it, so a proxy may strip the prefix or leave it.
    """

    def __init__(self, app: ASGIApp, metrics: MetricsLike, root_path: str = "") -> None:
        self._app = app
        self._metrics = metrics
        self._root_path = root_path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        label = given if _LABEL.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["label"] = label
        if self._root_path and scope.get("root_path") == self._root_path:
            scope["path"] = scope["path"][len(self._root_path) :]  # the server put it before whatever came in
        scope["root_path"] = self._root_path
        start = time.monotonic()
        status = 0

        async def labelled(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = label
            await send(message)

        try:
            await self._app(scope, receive, labelled)
        except Exception as error:
            if status:  # the head is out: all that is left is to break the connection
                raise
            await reply_for(error, label).response()(scope, receive, labelled)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            seconds = time.monotonic() - start
            method = scope["method"] if scope["method"] in _METHODS else "other"  # no series for every word sent
            self._metrics.http_request(route, method, status or ClientGone.status, seconds)
