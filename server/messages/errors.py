"""How an error looks to a client of ``/v1/messages``."""

from http import HTTPStatus

import orjson

from server.openai.errors import MAX_MESSAGE_CHARS, ErrorAnswer

PATH = "/v1/messages"
_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
    HTTPStatus.GATEWAY_TIMEOUT: "timeout_error",
}


def message_error(answer: ErrorAnswer) -> bytes:
    """The body of a response, and the data of an ``error`` event."""
    kind = "api_error" if answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR else answer.type
    error = {"type": _TYPES.get(answer.status, kind), "message": answer.message[:MAX_MESSAGE_CHARS]}
    return orjson.dumps({"type": "error", "error": error})


def is_message_path(path: str) -> bool:
    return path == PATH or path.startswith(f"{PATH}/")
