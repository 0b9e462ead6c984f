"""``/openapi.json``: the request bodies of the API, from the types that read them.

Written by hand around msgspec's schemas, because the endpoints check their bodies themselves.
Answers are described by the APIs they follow, and here only by their status.
"""

import re
from typing import Any

import msgspec

from server.messages.schema import CountRequest, MessagesRequest
from server.openai.schema import ChatRequest, CompletionRequest
from server.openai.tokens import DetokenizeRequest, TokenizeRequest
from server.responses.schema import ResponsesRequest

BODIES: dict[str, type[msgspec.Struct]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_PATHS = ("/v1/models", "/health", "/ready", "/metrics", "/version")
_BY_ID = {
    "/v1/models/{id}": ("get",),
    "/v1/responses/{id}": ("get", "delete"),
    "/v1/responses/{id}/cancel": ("post",),
}
_STATUSES = ("400", "401", "404", "413", "415", "429", "500", "502", "503", "504")
_REFERENCE = "#/components/schemas/{name}"


def openapi(version: str) -> dict[str, Any]:
    """The whole document."""
    schemas, components = msgspec.json.schema_components(BODIES.values(), ref_template=_REFERENCE)
    paths: dict[str, Any] = {
        path: {"post": _operation(path, {"requestBody": _body(schema)})}
        for path, schema in zip(BODIES, schemas, strict=True)
    }
    paths |= {path: {"get": _operation(path, {})} for path in _PATHS}
    for path, methods in _BY_ID.items():
        paths[path] = {method: _operation(f"{path}/{method}", _ID) for method in methods}
    return {
        "openapi": "3.1.0",
        "info": {"title": "headrace", "version": version},
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _ERROR, "MessagesError": _MESSAGES_ERROR}
        },
    }


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _operation(path: str, more: dict[str, Any]) -> dict[str, Any]:
    name = "_".join(re.findall(r"\w+", path))
    error = "MessagesError" if path.startswith("/v1/messages") else "Error"
    shown = {"application/json": {"schema": {"$ref": _REFERENCE.format(name=error)}}}
    errors = {status: {"description": "see docs/api.md", "content": shown} for status in _STATUSES}
    return {"operationId": name, **more, "responses": {"200": {"description": "OK"}, **errors}}


_ID = {"parameters": [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]}
_MESSAGES_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}
_NULLABLE = {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _NULLABLE,
                "code": _NULLABLE,
            },
        }
    },
}
