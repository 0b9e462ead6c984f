"""How each error looks to an OpenAI client. The only place that knows HTTP status codes.

Every body is ``{"error": {"message", "type", "param", "code"}}``: clients silently drop anything
flatter in mid-stream. What went wrong inside is for the log; the caller reads allow-listed text.
"""

from dataclasses import dataclass, field
from http import HTTPStatus
from math import ceil
from typing import NamedTuple

import orjson

from protocol import errors

MAX_MESSAGE_CHARS = 4000
_STAGES = frozenset(("queue", "reserve", "prefill", "transfer", "decode"))


class HttpError(Exception):
    """The HTTP exchange itself is wrong, whatever the request asks for."""

    def __init__(
        self, status: HTTPStatus, message: str, *, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


class Answer(NamedTuple):
    """``message`` None shows the error's own words, which then must be meant for the caller."""

    status: HTTPStatus
    type: str
    message: str | None = None
    retry_after_s: int | None = None


_BUSY = "the server has no capacity for this request now; try again later"
ANSWERS: dict[type[errors.ServingError], Answer] = {
    errors.RequestError: Answer(HTTPStatus.BAD_REQUEST, "invalid_request_error"),
    errors.ModelNotFound: Answer(HTTPStatus.NOT_FOUND, "not_found_error"),
    errors.CapacityError: Answer(
        HTTPStatus.SERVICE_UNAVAILABLE, "overloaded_error", _BUSY, retry_after_s=2
    ),
    errors.RateLimited: Answer(HTTPStatus.TOO_MANY_REQUESTS, "rate_limit_error", retry_after_s=1),
    errors.NoWorkerAvailable: Answer(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "overloaded_error",
        "no worker can serve this model now; try again later",
        retry_after_s=5,
    ),
    errors.Draining: Answer(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "overloaded_error",
        "the server is shutting down; try again",
        retry_after_s=5,
    ),
    errors.TransferError: Answer(
        HTTPStatus.BAD_GATEWAY, "server_error", "the prompt's KV cache could not be transferred"
    ),
    errors.WorkerLost: Answer(
        HTTPStatus.BAD_GATEWAY, "server_error", "a worker was lost while it held the request"
    ),
    errors.DeadlineExceeded: Answer(
        HTTPStatus.GATEWAY_TIMEOUT, "timeout_error", "the request took longer than it may"
    ),
    errors.ServingError: Answer(
        HTTPStatus.INTERNAL_SERVER_ERROR, "server_error", "the request failed inside the server"
    ),
}
_HTTP_TYPES = {
    HTTPStatus.UNAUTHORIZED: ("authentication_error", "invalid_api_key"),
    HTTPStatus.NOT_FOUND: ("not_found_error", "unknown_url"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorAnswer:
    """One error, ready for either way of saying it: a response, or the last event of a stream."""

    status: HTTPStatus
    type: str
    message: str
    param: str | None = None
    code: str | None = None
    headers: tuple[tuple[str, str], ...] = field(default=())

    def body(self) -> bytes:
        message = self.message[:MAX_MESSAGE_CHARS]
        envelope = {"message": message, "type": self.type, "param": self.param, "code": self.code}
        return orjson.dumps({"error": envelope})


def answer_for(error: errors.ServingError) -> Answer:
    """The entry of the nearest ancestor class, so a new leaf error needs no new row."""
    return next(ANSWERS[cls] for cls in type(error).__mro__ if cls in ANSWERS)


def describe(error: Exception) -> ErrorAnswer:
    """What the caller is told. An exception that is neither kind is a bug, and says only that."""
    if isinstance(error, HttpError):
        kind, code = _HTTP_TYPES.get(error.status, ("invalid_request_error", None))
        return ErrorAnswer(
            status=error.status, type=kind, message=str(error), code=code, headers=error.headers
        )
    if not isinstance(error, errors.ServingError):
        return ErrorAnswer(
            status=HTTPStatus.INTERNAL_SERVER_ERROR,
            type="server_error",
            message="the server has a fault; its log has the details under this request's id",
        )
    answer = answer_for(error)
    message = str(error) if answer.message is None else answer.message
    if answer.message is not None and error.stage in _STAGES:
        message = f"{message} (stage: {error.stage})"
    return ErrorAnswer(
        status=answer.status,
        type=answer.type,
        message=message,
        param=_param(error),
        code=error.code,
        headers=_retry_headers(error, answer),
    )


def _param(error: errors.ServingError) -> str | None:
    if isinstance(error, errors.ModelNotFound):
        return "model"
    return error.param if isinstance(error, errors.InvalidRequest) else None


def _retry_headers(error: errors.ServingError, answer: Answer) -> tuple[tuple[str, str], ...]:
    """OpenAI's clients retry every 5xx unless told otherwise; overload must not be tripled."""
    if answer.retry_after_s is not None:
        seconds = error.retry_after_s or answer.retry_after_s
        return (("retry-after", str(max(1, ceil(seconds)))),)
    if answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR and not error.retryable:
        return (("x-should-retry", "false"),)
    return ()
