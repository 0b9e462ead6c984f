"""Which models there are: ``/v1/models`` and the look-up that every request makes."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from protocol.errors import ModelNotFound, NoWorkerAvailable
from server.generation import Generator, ServedModel
from server.json_response import json_response


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

    async def list_models(self, _request: Request) -> Response:
        entries = [_entry(model) for model in self._generator.models()]
        return json_response({"object": "list", "data": entries})

    async def get_model(self, request: Request) -> Response:
        return json_response(_entry(find_model(self._generator, request.path_params["id"])))


def _entry(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "headrace",
        "max_model_len": model.max_model_len,
    }
