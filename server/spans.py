"""Spans of requests for a trace collector, over OTLP/HTTP with JSON. Off unless it is given where.

A request's span has a child for each stage of each of its attempts, under the service and the
worker where the time went: the gateway saw when workers were asked and answered, and a prefill
worker says how long it has queued and computed, so workers need no exporter and no clock that
agrees with ours. Nothing of a prompt or an answer is in them.

Invariant: exporting never delays a request and never grows without bound: spans that cannot be
sent in time are dropped and counted. Source: OpenTelemetry protocol, OTLP/HTTP, JSON encoding;
names of attributes: OpenTelemetry semantic conventions for generative AI.
"""

import secrets
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

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
Service = Literal["gateway", "prefill", "decode"]
Resource = tuple[Service, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpan:
    """``begin_s`` after the request's own beginning. ``worker`` is empty for the gateway's own."""

    name: str
    begin_s: float
    seconds: float
    service: Service = "gateway"
    worker: str = ""
    failure: str = ""
    attributes: Mapping[str, Value] = field(default_factory=dict[str, Value])


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSpan:
    name: str
    trace: TraceContext | None  # None: a trace of its own
    started_unix_s: float
    seconds: float
    failed: bool
    stages: Sequence[StageSpan]
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
        spans: dict[Resource, list[dict[str, Any]]] = {}
        for resource, encoded in (pair for span in batch for pair in _encoded(span)):
            spans.setdefault(resource, []).append(encoded)
        try:
            answer = await self._client.post(self._url, json=_envelope(spans))
            answer.raise_for_status()
        except httpx.HTTPError as error:
            self.dropped += len(batch)
            log.warning("spans dropped", requests=len(batch), reason=type(error).__name__)


def _encoded(span: RequestSpan) -> Iterator[tuple[Resource, dict[str, Any]]]:
    trace_id = span.trace.trace_id if span.trace else secrets.token_hex(16)
    span_id = span.trace.span_id if span.trace else secrets.token_hex(8)
    start = span.started_unix_s
    whole = {
        **_span((trace_id, span_id), span.name, _SERVER, start, span.seconds),
        "attributes": _attributes(span.attributes),
        "status": {"code": _ERROR if span.failed else _OK},
    }
    if span.trace is not None:
        whole["parentSpanId"] = span.trace.parent_id
    yield ("gateway", ""), whole
    for stage in span.stages:
        ids = (trace_id, secrets.token_hex(8))
        child = _span(ids, stage.name, _INTERNAL, start + stage.begin_s, stage.seconds)
        status = {"code": _ERROR, "message": stage.failure} if stage.failure else {"code": _OK}
        of_stage = {"attributes": _attributes(stage.attributes), "status": status}
        yield (stage.service, stage.worker), {**child, **of_stage, "parentSpanId": span_id}


def _span(
    ids: tuple[str, str], name: str, kind: int, start: float, seconds: float
) -> dict[str, Any]:
    return {
        "traceId": ids[0],
        "spanId": ids[1],
        "name": name,
        "kind": kind,
        "startTimeUnixNano": str(round(start * 1e9)),
        "endTimeUnixNano": str(round((start + seconds) * 1e9)),
    }


def _attributes(attributes: Mapping[str, Value]) -> list[dict[str, Any]]:
    return [_attribute(name, value) for name, value in attributes.items()]


def _attribute(name: str, value: Value) -> dict[str, Any]:
    if isinstance(value, str):
        return {"key": name, "value": {"stringValue": value}}
    kind = "intValue" if isinstance(value, int) else "doubleValue"
    return {"key": name, "value": {kind: str(value) if isinstance(value, int) else value}}


def _envelope(spans: Mapping[Resource, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    scope = {"name": "headrace"}
    return {
        "resourceSpans": [
            {
                "resource": {"attributes": _attributes(_named(*resource))},
                "scopeSpans": [{"scope": scope, "spans": list(of_it)}],
            }
            for resource, of_it in spans.items()
        ]
    }


def _named(service: Service, worker: str) -> dict[str, Value]:
    name: dict[str, Value] = {"service.name": f"headrace-{service}"}
    return {**name, "service.instance.id": worker} if worker else name
