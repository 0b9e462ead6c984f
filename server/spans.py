"""Spans of requests for a trace collector, over OTLP/HTTP with JSON. Off unless it is given where.

A request's span has a child for each stage of each of its attempts, under the service and the
worker where the time went: the gateway saw when workers were asked and answered, and a prefill
worker says how long it has queued and computed, so workers need no exporter and no clock that
agrees with ours. Nothing of a prompt or an answer is in them.

Invariant: exporting never delays a request and never grows without bound, whatever the collector
or callers do: spans that cannot be sent in time are dropped and counted. Source: OpenTelemetry
protocol, OTLP/HTTP, JSON encoding; names of attributes: OpenTelemetry semantic conventions for
generative AI.
"""

import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import anyio
import httpx
import orjson
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.log import get_log
from server.tracing import TraceContext

log = get_log(__name__)

EXPORT_S = 1.0
MAX_WAITING = 32_768  # spans
MAX_NOT_ADMITTED = 64  # of those that wait: whoever floods us must not crowd out the others
MAX_AT_ONCE = 256  # spans, and the rest of a request: encoding them takes 2 ms from all streams
SEND_S = 5.0
LAST_SEND_S = 2.0  # for what waits when the process ends
_SERVER, _INTERNAL = 2, 1  # kinds
_OK, _ERROR = 1, 2  # statuses

Value = str | int | float
Service = Literal["gateway", "prefill", "decode"]
Resource = tuple[Service, str]
DropReason = Literal["queue", "collector", "not_admitted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpan:
    """``begin_s`` after the request's own beginning. ``worker`` is empty for the gateway's own.
    ``failure`` says why it did not end well, if it did not.
    """

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
    failure: str
    stages: Sequence[StageSpan]
    attributes: Mapping[str, Value] = field(default_factory=dict[str, Value])
    admitted: bool = True  # False: refused before anything of it was read

    def __len__(self) -> int:
        return 1 + len(self.stages)


class SpanExporter:
    """``endpoint`` is the collector's base URL, such as ``http://collector:4318``."""

    def __init__(self, endpoint: str, client: httpx.AsyncClient | None = None) -> None:
        self._url = f"{endpoint.rstrip('/')}/v1/traces"
        self._client = client or httpx.AsyncClient(timeout=SEND_S)
        self._waiting: deque[RequestSpan] = deque()
        self._waiting_spans = 0
        self._not_admitted = 0  # of those that wait
        self._lost_requests = 0  # since the collector was last well
        self.dropped: dict[DropReason, int] = dict.fromkeys(get_args(DropReason), 0)  # spans

    def add(self, span: RequestSpan) -> None:
        if not span.admitted:
            if self._not_admitted == MAX_NOT_ADMITTED:
                self.dropped["not_admitted"] += len(span)
                return
            self._not_admitted += 1
        self._waiting.append(span)
        self._waiting_spans += len(span)
        while self._waiting_spans > MAX_WAITING:
            self.dropped["queue"] += len(self._pop())

    @property
    def waiting(self) -> int:
        """Spans that have not been sent yet."""
        return self._waiting_spans

    async def run(self) -> None:
        """Send what has been added, until cancelled; what waits then is sent in a short time."""
        async with self._client:
            try:
                while True:
                    await anyio.sleep(EXPORT_S)
                    while self._waiting and await self.export():
                        pass
            finally:
                with anyio.move_on_after(LAST_SEND_S, shield=True):
                    while self._waiting and await self.export():
                        pass

    async def export(self) -> bool:
        """Send one batch; False if the collector does not take it: then it is dropped."""
        batch: list[RequestSpan] = []
        count = 0
        while self._waiting and count < MAX_AT_ONCE:
            batch.append(self._pop())
            count += len(batch[-1])
        spans: dict[Resource, list[dict[str, Any]]] = {}
        for resource, encoded in (pair for span in batch for pair in _encoded(span)):
            spans.setdefault(resource, []).append(encoded)
        try:
            await self._send(orjson.dumps(_envelope(spans)))
        except (httpx.HTTPError, TimeoutError) as error:
            self.dropped["collector"] += count
            if not self._lost_requests:  # one line until it is well again, not one a second
                log.warning("spans are dropped", reason=str(error) or type(error).__name__)
            self._lost_requests += len(batch)
            return False
        if self._lost_requests:
            log.info("spans are sent again", dropped_requests=self._lost_requests)
            self._lost_requests = 0
        return True

    async def _send(self, content: bytes) -> None:
        """
        Raises:
            httpx.HTTPError: the collector cannot be reached, or refuses.
            TimeoutError: it takes too long, however busily. What it says of them is not read.
        """
        headers = {"content-type": "application/json"}
        asking = self._client.stream("POST", self._url, content=content, headers=headers)
        with anyio.fail_after(SEND_S):
            async with asking as answer:
                answer.raise_for_status()

    def _pop(self) -> RequestSpan:
        span = self._waiting.popleft()
        self._waiting_spans -= len(span)
        self._not_admitted -= not span.admitted
        return span


class DroppedSpans(Collector):
    """What an exporter could not send, for /metrics.

    headrace_dropped_spans_total{reason}    queue: more waited than there is room for;
                                            collector: it did not take them;
                                            not_admitted: of too many requests without a valid key
                                            or over a limit of HTTP
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(
            "headrace_dropped_spans",
            "Spans that no collector got: queue, collector, not_admitted",
            labels=["reason"],
        )
        for reason, spans in self._exporter.dropped.items():
            family.add_metric([reason], spans)
        yield family


def _encoded(span: RequestSpan) -> Iterator[tuple[Resource, dict[str, Any]]]:
    trace_id = span.trace.trace_id if span.trace else secrets.token_hex(16)
    span_id = span.trace.span_id if span.trace else secrets.token_hex(8)
    start = span.started_unix_s
    whole = {
        **_span((trace_id, span_id), span.name, _SERVER, start, span.seconds),
        "attributes": _attributes(span.attributes),
        "status": _status(span.failure),
    }
    if span.trace is not None:
        whole["parentSpanId"] = span.trace.parent_id
    state = {"traceState": span.trace.state} if span.trace and span.trace.state else {}
    yield ("gateway", ""), {**whole, **state}
    for stage in span.stages:
        ids = (trace_id, secrets.token_hex(8))
        child = _span(ids, stage.name, _INTERNAL, start + stage.begin_s, stage.seconds)
        of_stage = {
            "attributes": _attributes(stage.attributes),
            "status": _status(stage.failure),
        }
        yield (
            (stage.service, stage.worker),
            {**child, **of_stage, **state, "parentSpanId": span_id},
        )


def _status(failure: str) -> dict[str, Any]:
    return {"code": _ERROR, "message": failure} if failure else {"code": _OK}


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
