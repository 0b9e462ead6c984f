"""Which models there are: ``/v1/models`` and the look-up that every request makes.

Two APIs have this path. The header that every client of the Messages API sends gets it that API's
fields beside OpenAI's.
"""

from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from protocol.errors import ModelNotFound, NoWorkerAvailable
from server.generation import Generator, ServedModel
from server.json_response import json_response

_MESSAGES_API = "anthropic-version"


def find_model(generator: Generator, name: str) -> ServedModel:
    """
    Raises:
        NoWorkerAvailable: nothing is served yet.
        ModelNotFound: something else is; the message names it.
    """
    models = generator.models()
    for model in models:
        if model.id == name:
            return model
    if not models:
        raise NoWorkerAvailable("no worker has announced a model yet")
    served = ", ".join(sorted(model.id for model in models))
    raise ModelNotFound(f"model: there is no such model here; this server has {served}")


class ModelEndpoints:
    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    async def list_models(self, request: Request) -> Response:
        models = self._generator.models()
        both = _MESSAGES_API in request.headers
        shown: dict[str, Any] = {"object": "list", "data": [_entry(m, both=both) for m in models]}
        if both:
            first, last = (models[0].id, models[-1].id) if models else (None, None)
            shown |= {"has_more": False, "first_id": first, "last_id": last}
        return json_response(shown)

    async def get_model(self, request: Request) -> Response:
        model = find_model(self._generator, request.path_params["id"])
        return json_response(_entry(model, both=_MESSAGES_API in request.headers))


def _entry(model: ServedModel, *, both: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "headrace",
        "max_model_len": model.max_model_len,
    }
    if both:
        entry |= {
            "type": "model",
            "display_name": model.id,
            "created_at": datetime.fromtimestamp(model.created, UTC).isoformat(),
            "lifecycle": "active",
            "max_input_tokens": model.max_model_len,
            "max_tokens": model.max_model_len,
        }
    return entry
