"""Spans of requests for a trace collector, over OTLP/HTTP with JSON. Off unless it is given where.

A request's span has children for the stages that its first token went through, as the gateway and
the prefill worker measured them, and for decoding. Nothing of a prompt or an answer is in them.

Invariant: exporting never delays a request and never grows without bound: spans that cannot be
sent in time are dropped and counted. Source: OpenTelemetry protocol, OTLP/HTTP, JSON encoding;
names of attributes: OpenTelemetry semantic conventions for generative AI.
"""

import secrets
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx

from runtime.log import get_log
from server.tracing import TraceContext

log = get_log(__name__)

EXPORT_S = 1.0
MAX_WAITING = 4096  # requests
MAX_AT_ONCE = 256
SEND_S = 5.0
_SERVER, _INTERNAL = 2, 1  # kinds
_OK, _ERROR = 1, 2  # statuses

Value = str | int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSpan:
    """``stages`` are in order and without gaps from the start: (name, seconds)."""

    name: str
    trace: TraceContext | None  # None: a trace of its own
    started_unix_s: float
    seconds: float
    failed: bool
    stages: Sequence[tuple[str, float]]
    attributes: Mapping[str, Value] = field(default_factory=dict[str, Value])


class SpanExporter:
    """``endpoint`` is the collector's base URL, such as ``http://collector:4318``."""

    def __init__(self, endpoint: str, client: httpx.AsyncClient | None = None) -> None:
        self._url = f"{endpoint.rstrip('/')}/v1/traces"
        self._client = client or httpx.AsyncClient(timeout=SEND_S)
        self._waiting: deque[RequestSpan] = deque()
        self.dropped = 0

    def add(self, span: RequestSpan) -> None:
        if len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft()
            self.dropped += 1
        self._waiting.append(span)

    async def run(self) -> None:
        """Send what has been added, until cancelled."""
        async with self._client:
            while True:
                await anyio.sleep(EXPORT_S)
                while self._waiting:
                    await self.export()

    async def export(self) -> None:
        """Send one batch; what the collector does not take is dropped."""
        batch = [self._waiting.popleft() for _ in range(min(MAX_AT_ONCE, len(self._waiting)))]
        spans = [encoded for span in batch for encoded in _encoded(span)]
        try:
            answer = await self._client.post(self._url, json=_envelope(spans))
            answer.raise_for_status()
        except httpx.HTTPError as error:
            self.dropped += len(batch)
            log.warning("spans dropped", requests=len(batch), reason=type(error).__name__)


def _encoded(span: RequestSpan) -> Iterator[dict[str, Any]]:
    trace_id = span.trace.trace_id if span.trace else secrets.token_hex(16)
    span_id = span.trace.span_id if span.trace else secrets.token_hex(8)
    start = span.started_unix_s
    whole: dict[str, Any] = {
        **_span((trace_id, span_id), span.name, _SERVER, start, start + span.seconds),
        "attributes": [_attribute(*item) for item in span.attributes.items()],
        "status": {"code": _ERROR if span.failed else _OK},
    }
    if span.trace is not None:
        whole["parentSpanId"] = span.trace.parent_id
    yield whole
    for name, seconds in span.stages:
        child = _span((trace_id, secrets.token_hex(8)), name, _INTERNAL, start, start + seconds)
        yield {**child, "parentSpanId": span_id}
        start += seconds


def _span(ids: tuple[str, str], name: str, kind: int, start: float, end: float) -> dict[str, Any]:
    return {
        "traceId": ids[0],
        "spanId": ids[1],
        "name": name,
        "kind": kind,
        "startTimeUnixNano": str(round(start * 1e9)),
        "endTimeUnixNano": str(round(end * 1e9)),
    }


def _attribute(name: str, value: Value) -> dict[str, Any]:
    if isinstance(value, str):
        return {"key": name, "value": {"stringValue": value}}
    kind = "intValue" if isinstance(value, int) else "doubleValue"
    return {"key": name, "value": {kind: str(value) if isinstance(value, int) else value}}


def _envelope(spans: Sequence[dict[str, Any]]) -> dict[str, Any]:
    resource = {"attributes": [_attribute("service.name", "headrace-gateway")]}
    scope = {"scope": {"name": "headrace"}, "spans": list(spans)}
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [scope]}]}
