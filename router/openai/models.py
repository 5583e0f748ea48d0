"""GET /v1/models and /v1/models/{id}: the model that is served, once per name."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from proto.errors import ModelNotFound
from router.openai.serving import Api
from router.tokenizer import ServedModel


async def list_models(api: Api, request: Request) -> Response:
    """Raises NoWorker while no worker has ever shown a model."""
    model = api.models.current()
    return JSONResponse({"object": "list", "data": [_card(model, name) for name in model.names]})


async def show_model(api: Api, request: Request) -> Response:
    """Raises ModelNotFound, NoWorker."""
    model, name = api.models.current(), str(request.path_params["model_id"])
    if name not in model.names:
        raise ModelNotFound(f"The model `{name[:200]}` does not exist.", param="model")
    return JSONResponse(_card(model, name))


def _card(model: ServedModel, name: str) -> dict[str, object]:
    permission = {
        "id": f"modelperm-{model.card.digest[:24]}",
        "object": "model_permission",
        "created": model.created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "tandem",
        "root": model.card.model,
        "parent": None,
        "max_model_len": model.max_model_len,
        "permission": [permission],
    }
