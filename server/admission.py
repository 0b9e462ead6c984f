"""What one HTTP exchange may bring: size of its headers and body, its type, its key, its id.

Invariant: no endpoint sees a request that is over a limit, or, where keys are set, one without a
valid key; only the paths in ``PUBLIC_PATHS`` are open to everyone.
"""

import re
from http import HTTPStatus
from time import monotonic

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protocol.ids import new_request_id
from server.access import ApiKeys
from server.error_bodies import error_body
from server.messages.errors import is_message_path
from server.openai.errors import HttpError, describe
from server.openai.request_span import refused_span
from server.page.files import PAGE_PATHS
from server.spans import RequestSpan, SpanExporter
from server.tracing import TraceContext, trace_of

MAX_HEADERS = 64
MAX_HEADER_BYTES = 16 * 1024
PUBLIC_PATHS = frozenset(("/health", "/ready", "/version", *PAGE_PATHS))

_CLIENT_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}\Z")
_SECONDS = re.compile(rb"[0-9]{1,6}(?:\.[0-9]{1,6})?\Z")
_JSON = re.compile(rb"application/(?:[a-z0-9.-]+\+)?json\s*(?:;.*)?\Z", re.IGNORECASE)


class Admission:
    """ASGI middleware, outermost. Gives every request an id of ours in ``scope["state"]``, and its
    headers by name.

    ``answer_id`` is the key of everything inside. ``request_id`` is what logs and the response
    header show: the client's own where it sent a decent one, which is never used as a key.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        api_keys: ApiKeys | None,
        spans: SpanExporter | None = None,
    ) -> None:
        self._app = app
        self._spans = spans
        self._max_body_bytes = max_body_bytes
        self._api_keys = api_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived = monotonic()
        headers = dict(scope["headers"])
        answer_id = new_request_id()
        given = headers.get(b"x-request-id", b"")
        request_id = given if _CLIENT_ID.match(given) else answer_id.encode()
        scope.setdefault("state", {})
        state = scope["state"]
        state |= {"answer_id": answer_id, "request_id": request_id.decode(), "headers": headers}
        trace = trace_of(headers, scope["headers"])
        state["trace"] = trace

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                spent_ms = b"%d" % ((monotonic() - arrived) * 1000)
                ours = [(b"x-request-id", request_id), (b"openai-processing-ms", spent_ms)]
                if is_message_path(scope["path"]):
                    ours.append((b"request-id", request_id))  # where that API's clients look
                if trace is not None:
                    ours.append((b"traceparent", trace.traceparent))
                if (quota := state.get("quota")) is not None:
                    ours += quota.headers(monotonic())
                message["headers"] = [*message["headers"], *ours]
            await send(message)

        try:
            self._check(scope, headers)
        except HttpError as error:
            if self._spans is not None and (trace is None or trace.sampled):
                self._spans.add(_span_of(error, trace, seconds=monotonic() - arrived))
            await send_error(send_with_id, error, path=scope["path"])
            return
        await self._app(scope, _limited(receive, self._max_body_bytes), send_with_id)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if len(scope["headers"]) > MAX_HEADERS or size > MAX_HEADER_BYTES:
            raise HttpError(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                f"more than {MAX_HEADERS} headers, or more than {MAX_HEADER_BYTES} bytes of them",
            )
        keys = None if scope["path"] in PUBLIC_PATHS else self._api_keys
        if keys is not None:
            key = keys.find(headers)
            if key is None:
                raise HttpError(
                    HTTPStatus.UNAUTHORIZED,
                    "a valid API key is needed: send it as Authorization: Bearer KEY",
                    headers=(("www-authenticate", "Bearer"),),
                )
            scope["state"] |= {"caller": key.caller, "quota": key.quota}
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_body_bytes:
            raise _too_large(self._max_body_bytes)


def _span_of(error: HttpError, trace: TraceContext | None, *, seconds: float) -> RequestSpan:
    answer = describe(error)
    return refused_span(
        "admission",  # a path of the caller's choice is no name
        trace=trace,
        seconds=seconds,
        status=int(answer.status),
        code=answer.code,
        admitted=False,
    )


def _limited(receive: Receive, max_bytes: int) -> Receive:
    """``receive`` that refuses a body which grows beyond the limit, whatever it announced."""
    received = 0

    async def receive_limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise _too_large(max_bytes)
        return message

    return receive_limited


def _too_large(max_bytes: int) -> HttpError:
    return HttpError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is larger than {max_bytes} bytes"
    )


async def read_json_body(scope: Scope, receive: Receive, *, timeout_s: float) -> bytes:
    """The whole body of a request that says it is JSON.

    Raises:
        HttpError: another content type, a body over the limit, or one that comes too slowly.
    """
    headers: dict[bytes, bytes] = scope["state"]["headers"]
    if not _JSON.match(headers.get(b"content-type", b"")):
        raise HttpError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "the body must be plain JSON: send content-type: application/json",
        )
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise HttpError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "the body must be plain JSON: send it without content-encoding",
            headers=(("accept-encoding", "identity"),),
        )
    parts: list[bytes] = []
    with anyio.move_on_after(timeout_s):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise HttpError(HTTPStatus.BAD_REQUEST, "the body ended before it was complete")
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                return b"".join(parts)
    raise HttpError(HTTPStatus.REQUEST_TIMEOUT, f"the body took longer than {timeout_s:g} s")


async def send_error(send: Send, error: Exception, *, path: str) -> None:
    """The whole response for a request that failed before anything was sent."""
    answer = describe(error)
    body = error_body(answer, path)
    headers = [(name.encode(), value.encode()) for name, value in answer.headers]
    headers.append((b"content-type", b"application/json"))
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def logged_ids(scope: Scope) -> dict[str, str]:
    """What every line of the log says of this exchange."""
    state = scope["state"]
    ids = {"request": state["request_id"], "answer": state["answer_id"]}
    trace: TraceContext | None = state.get("trace")
    return ids if trace is None else {**ids, "trace": trace.trace_id}


def time_allowed_s(scope: Scope, *, at_most: float) -> float:
    """Seconds that the request may take: what its ``x-request-timeout`` says, or ``at_most``.

    Raises:
        HttpError: the header is not a positive number of seconds.
    """
    headers: dict[bytes, bytes] = scope["state"]["headers"]
    given = headers.get(b"x-request-timeout")
    if given is None:
        return at_most
    if not _SECONDS.match(given) or not float(given):
        raise HttpError(
            HTTPStatus.BAD_REQUEST, "x-request-timeout must be a positive number of seconds"
        )
    return min(float(given), at_most)
