"""The HTTP application: which path is answered by what, and in which order the layers stand.

Edge (labels, errors, metrics) ▶ CORS ▶ ApiKeys ▶ routes ▶ router.openai
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from proto.errors import TandemError
from proto.settings import RouterSettings
from proto.version import __version__
from router.auth import ApiKeys, is_authorized, read_keys
from router.contract import FlowLike, MetricsLike, ModelProvider, Readiness
from router.edge import Edge
from router.openai.chat import create_chat_completion
from router.openai.completions import create_completion
from router.openai.errors import ClientGone, reply_for
from router.openai.models import list_models, show_model
from router.openai.serving import Api, label_of
from router.openai.tokens import detokenize, tokenize

_MAX_SHOWN = 200

Endpoint = Callable[[Api, Request], Awaitable[Response]]
Handler = Callable[[Request], Awaitable[Response]]

_EXPOSED = ["x-request-id", "x-tandem-ignored", "x-tandem-prefill", "x-tandem-decode", "server-timing", "retry-after"]

_JSON_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}}
"""For /docs: the fields are read by ``router.validate``, which FastAPI does not see."""


def build_app(
    settings: RouterSettings,
    flow: FlowLike,
    models: ModelProvider,
    ready: Callable[[], Readiness],
    metrics: MetricsLike,
) -> FastAPI:
    """The application, ready for any ASGI server; ``settings.root_path`` is dealt with here, not by the server.

    Raises SettingsError when the key file cannot be read.
    """
    api = Api(settings=settings, flow=flow, models=models, metrics=metrics, version=__version__)
    # Without the schema there is no /docs nor /redoc either.
    schema = None if settings.disable_fastapi_docs else "/openapi.json"
    app = FastAPI(title="Tandem", version=api.version, redirect_slashes=False, openapi_url=schema)
    _add_openai_routes(app, api)
    _add_service_routes(app, api, ready)
    for kind in (TandemError, HTTPException, ClientGone, ClientDisconnect):
        app.add_exception_handler(kind, _handle_error)
    # The middleware added last stands outermost.
    app.add_middleware(ApiKeys, keys=read_keys(settings))
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )
    app.add_middleware(Edge, metrics=metrics, root_path=settings.root_path)
    return app


def _add_openai_routes(app: FastAPI, api: Api) -> None:
    def add(path: str, method: str, endpoint: Endpoint) -> None:
        async def handle(request: Request) -> Response:
            return await endpoint(api, request)

        handle.__name__, handle.__doc__ = endpoint.__name__, endpoint.__doc__
        app.add_api_route(path, handle, methods=[method], openapi_extra=_JSON_BODY if method == "POST" else None)
        if method == "GET":
            app.add_api_route(path, handle, methods=["HEAD"], include_in_schema=False)

    add("/v1/completions", "POST", create_completion)
    add("/v1/chat/completions", "POST", create_chat_completion)
    add("/v1/models", "GET", list_models)
    add("/v1/models/{model_id:path}", "GET", show_model)
    add("/tokenize", "POST", tokenize)
    add("/detokenize", "POST", detokenize)


def _add_service_routes(app: FastAPI, api: Api, ready: Callable[[], Readiness]) -> None:
    async def show_live(request: Request) -> Response:
        """The process runs and its event loop turns: nothing else is asked."""
        return JSONResponse({"status": "live"})

    async def show_ready(request: Request) -> Response:
        """Whether a generation would be served now, and if not, why. Details are for those who have a key."""
        now = ready()
        body: dict[str, object] = {"status": "ready" if now.ready else "not ready", "reasons": list(now.reasons)}
        if is_authorized(request):
            body["details"] = dict(now.details)
        return JSONResponse(body, status_code=200 if now.ready else 503)

    async def show_version(request: Request) -> Response:
        return JSONResponse({"version": api.version})

    async def show_metrics(request: Request) -> Response:
        body, content_type = api.metrics.exposition()
        return Response(body, media_type=content_type)

    def add(path: str, handle: Handler) -> None:
        app.add_api_route(path, handle, methods=["GET", "HEAD"], include_in_schema=False)

    add("/health", show_ready)
    add("/health/ready", show_ready)
    add("/ready", show_ready)
    add("/health/live", show_live)
    add("/version", show_version)
    add("/metrics", show_metrics)


async def _handle_error(request: Request, error: Exception) -> Response:
    if isinstance(error, (ClientGone, ClientDisconnect)):
        return Response(status_code=ClientGone.status)  # for logs and metrics: nobody reads it
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        error = _explained(error, request)
    return reply_for(error, label_of(request)).response()


def _explained(error: HTTPException, request: Request) -> HTTPException:
    """The router's "Not Found" and "Method Not Allowed" in words that help."""
    path = str(request.scope["path"])
    shown = path if len(path) <= _MAX_SHOWN else f"{path[:_MAX_SHOWN]}..."
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{shown} does not take {request.method}; it takes {allowed}."
    else:
        known = {getattr(route, "path", "") for route in request.app.routes}
        near = next(
            (other for other in (f"/v1{path}", path.removeprefix("/v1"), path.rstrip("/")) if other in known), ""
        )
        hint = f" Did you mean {near}?" if near else " GET /docs lists what it has." if "/docs" in known else ""
        message = f"This server has no {shown}.{hint}"
    return HTTPException(error.status_code, message, error.headers)
