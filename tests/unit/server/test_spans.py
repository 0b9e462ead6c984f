import json
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.settings import GatewaySettings
from server.spans import MAX_WAITING, RequestSpan, SpanExporter
from server.tracing import TraceContext
from tests.support.generator import ScriptedGenerator
from tests.support.model_text import byte_model_text

pytestmark = pytest.mark.anyio
TRACE = TraceContext("4b" * 16, "ab" * 8, "cd" * 8, "01")


def a_span(trace: TraceContext | None = TRACE) -> RequestSpan:
    return RequestSpan(
        name="chat tiny",
        trace=trace,
        started_unix_s=1000.0,
        seconds=2.0,
        failed=False,
        stages=[("wait", 0.25), ("prefill", 0.75), ("decode", 1.0)],
        attributes={"gen_ai.usage.output_tokens": 7, "gen_ai.request.model": "tiny"},
    )


class Collector:
    """Takes what is sent, or answers with ``status``."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.received: list[dict[str, Any]] = []

    def exporter(self) -> SpanExporter:
        transport = httpx.MockTransport(self._answer)
        return SpanExporter("http://collector:4318/", httpx.AsyncClient(transport=transport))

    def _answer(self, request: httpx.Request) -> httpx.Response:
        assert request.url == "http://collector:4318/v1/traces"
        self.received.append(json.loads(request.content))
        return httpx.Response(self.status)


async def test_a_request_is_a_span_in_the_callers_trace_with_its_stages_below() -> None:
    collector = Collector()
    exporter = collector.exporter()
    exporter.add(a_span())
    await exporter.export()
    (scope,) = collector.received[0]["resourceSpans"][0]["scopeSpans"]
    whole, *stages = scope["spans"]
    assert (whole["traceId"], whole["spanId"], whole["parentSpanId"]) == (
        TRACE.trace_id,
        TRACE.span_id,
        TRACE.parent_id,
    )
    assert whole["attributes"][0]["value"] == {"intValue": "7"}
    assert [stage["name"] for stage in stages] == ["wait", "prefill", "decode"]
    assert {stage["parentSpanId"] for stage in stages} == {TRACE.span_id}
    assert stages[0]["startTimeUnixNano"] == whole["startTimeUnixNano"] == str(1000 * 10**9)
    assert stages[1]["startTimeUnixNano"] == stages[0]["endTimeUnixNano"]
    assert stages[2]["endTimeUnixNano"] == whole["endTimeUnixNano"]


async def test_a_request_without_a_trace_begins_one() -> None:
    collector = Collector()
    exporter = collector.exporter()
    exporter.add(a_span(trace=None))
    await exporter.export()
    whole, *_ = collector.received[0]["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert len(whole["traceId"]) == 32
    assert "parentSpanId" not in whole


async def test_what_cannot_be_sent_is_dropped_and_counted() -> None:
    exporter = Collector(status=503).exporter()
    exporter.add(a_span())
    await exporter.export()
    assert exporter.dropped == 1
    for _ in range(MAX_WAITING + 3):
        exporter.add(a_span())
    assert exporter.dropped == 4


async def test_every_answered_request_leaves_a_span() -> None:
    collector = Collector()
    exporter = collector.exporter()
    text = byte_model_text()
    app = create_app(ScriptedGenerator(text=text), text, GatewaySettings(), spans=exporter)
    transport = httpx.ASGITransport(app=app)
    headers = {"traceparent": f"00-{TRACE.trace_id}-{TRACE.parent_id}-01"}
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        body = {"model": "tiny", "prompt": "secret words", "max_tokens": 3}
        await client.post("/v1/completions", json=body, headers=headers)
    await exporter.export()
    whole, *stages = collector.received[0]["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert whole["parentSpanId"] == TRACE.parent_id
    assert [stage["name"] for stage in stages] == ["wait", "queue", "prefill", "decode"]
    assert "secret" not in json.dumps(collector.received)
