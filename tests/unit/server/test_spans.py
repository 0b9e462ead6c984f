import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest

import server.spans
from server.app import create_app
from server.settings import GatewaySettings
from server.spans import (
    MAX_NOT_ADMITTED,
    MAX_WAITING,
    DroppedSpans,
    RequestSpan,
    SpanExporter,
    StageSpan,
)
from server.tracing import TraceContext
from tests.support.arithmetic import MODEL
from tests.support.generator import ScriptedGenerator
from tests.support.model_text import byte_model_text
from tests.support.system import System, a_system

pytestmark = pytest.mark.anyio
TRACE = TraceContext("4b" * 16, "ab" * 8, "cd" * 8, "01")


def a_span(trace: TraceContext | None = TRACE) -> RequestSpan:
    return RequestSpan(
        name="chat tiny",
        trace=trace,
        started_unix_s=1000.0,
        seconds=2.0,
        failure="",
        stages=[
            StageSpan(name="wait", begin_s=0.0, seconds=0.25),
            StageSpan(
                name="prefill", begin_s=0.25, seconds=0.75, service="prefill", worker="prefill-0"
            ),
            StageSpan(
                name="decode",
                begin_s=1.0,
                seconds=1.0,
                service="decode",
                worker="decode-0/1",
                failure="lost",
            ),
        ],
        attributes={"gen_ai.usage.output_tokens": 7, "gen_ai.request.model": "tiny"},
    )


BODY = {"model": MODEL, "prompt": "secret words", "max_tokens": 3}


@asynccontextmanager
async def asked_of(exporter: SpanExporter) -> AsyncGenerator[tuple[httpx.AsyncClient, System]]:
    """A system whose spans the exporter gets, and a client of it."""
    async with a_system() as system:
        app = create_app(
            system.serving,
            byte_model_text(),
            GatewaySettings(),
            spans=exporter,
            cluster=system.serving.cluster,
        )
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            yield client, system


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
    by_worker = spans_by_worker(collector)
    whole, wait = by_worker["headrace-gateway", ""]
    (prefill,) = by_worker["headrace-prefill", "prefill-0"]
    (decode,) = by_worker["headrace-decode", "decode-0/1"]
    assert (whole["traceId"], whole["spanId"], whole["parentSpanId"]) == (
        TRACE.trace_id,
        TRACE.span_id,
        TRACE.parent_id,
    )
    assert whole["attributes"][0]["value"] == {"intValue": "7"}
    stages = [wait, prefill, decode]
    assert [stage["name"] for stage in stages] == ["wait", "prefill", "decode"]
    assert {stage["parentSpanId"] for stage in stages} == {TRACE.span_id}
    assert wait["startTimeUnixNano"] == whole["startTimeUnixNano"] == str(1000 * 10**9)
    assert prefill["startTimeUnixNano"] == wait["endTimeUnixNano"]
    assert decode["endTimeUnixNano"] == whole["endTimeUnixNano"]
    assert (whole["status"], prefill["status"]) == ({"code": 1}, {"code": 1})
    assert decode["status"] == {"code": 2, "message": "lost"}


def spans_by_worker(collector: Collector) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """All that was sent, by service and worker."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for sent in collector.received:
        for resource in sent["resourceSpans"]:
            named = {
                a["key"]: a["value"]["stringValue"] for a in resource["resource"]["attributes"]
            }
            key = (named["service.name"], named.get("service.instance.id", ""))
            (scope,) = resource["scopeSpans"]
            found.setdefault(key, []).extend(scope["spans"])
    return found


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
    assert not await exporter.export()
    of_one = len(a_span())
    assert exporter.dropped == {"queue": 0, "collector": of_one, "not_admitted": 0}
    room = MAX_WAITING // of_one
    for _ in range(room + 3):
        exporter.add(a_span())
    assert exporter.dropped == {"queue": 3 * of_one, "collector": of_one, "not_admitted": 0}
    registry = CollectorRegistry()
    registry.register(DroppedSpans(exporter))
    shown = generate_latest(registry).decode()
    assert f'headrace_dropped_spans_total{{reason="queue"}} {3.0 * of_one}' in shown


async def test_spans_of_who_was_not_admitted_have_little_room_and_leave_the_others_theirs() -> None:
    collector = Collector()
    exporter = collector.exporter()
    stranger = replace(a_span(trace=None), stages=(), name="admission", admitted=False)
    for turn in (1, 2):
        exporter.add(a_span())
        for _ in range(MAX_NOT_ADMITTED + 5):
            exporter.add(stranger)
        exporter.add(a_span())
        assert exporter.dropped == {"queue": 0, "collector": 0, "not_admitted": 5 * turn}
        while await exporter.export() and exporter.waiting:
            pass
    names = [span["name"] for span in spans_by_worker(collector)["headrace-gateway", ""]]
    assert names.count("admission") == 2 * MAX_NOT_ADMITTED
    assert names.count("chat tiny") == 4


async def test_a_collector_that_is_away_makes_one_line_and_its_return_another(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="server.spans")
    collector = Collector(status=503)
    exporter = collector.exporter()
    for collector.status in (503, 503, 503, 200, 200, 503):
        exporter.add(a_span())
        await exporter.export()
    said = [record.getMessage() for record in caplog.records]
    assert said == ["spans are dropped", "spans are sent again", "spans are dropped"]


class Drips(httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            await anyio.lowlevel.checkpoint()
            yield b" " * 65536


async def test_a_collector_that_answers_without_end_is_not_listened_to() -> None:
    answers = httpx.MockTransport(lambda _: httpx.Response(200, stream=Drips()))
    exporter = SpanExporter("http://collector:4318", httpx.AsyncClient(transport=answers))
    exporter.add(a_span())
    with anyio.fail_after(10):
        assert await exporter.export()


async def test_a_collector_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.spans, "SEND_S", 0.01)

    async def never(_: httpx.Request) -> httpx.Response:
        await anyio.sleep_forever()
        raise AssertionError

    client = httpx.AsyncClient(transport=httpx.MockTransport(never))
    exporter = SpanExporter("http://collector:4318", client)
    exporter.add(a_span())
    with anyio.fail_after(10):
        assert not await exporter.export()
    assert exporter.dropped["collector"] == len(a_span())


async def test_what_waits_when_the_process_ends_is_sent() -> None:
    collector = Collector()
    exporter = collector.exporter()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(exporter.run)
        await anyio.wait_all_tasks_blocked()
        exporter.add(a_span())
        tasks.cancel_scope.cancel()
    assert len(collector.received) == 1


async def test_every_answered_request_leaves_a_span_and_each_stage_one_of_its_worker() -> None:
    collector = Collector()
    exporter = collector.exporter()
    async with asked_of(exporter) as (client, _):
        headers = {"traceparent": f"00-{TRACE.trace_id}-{TRACE.parent_id}-01"}
        answer = await client.post("/v1/completions", json={**BODY, "n": 2}, headers=headers)
    assert answer.status_code == 200
    await exporter.export()
    by_worker = spans_by_worker(collector)
    whole, *ours = by_worker.pop(("headrace-gateway", ""))
    assert whole["parentSpanId"] == TRACE.parent_id
    stages = {key: sorted(span["name"] for span in spans) for key, spans in by_worker.items()}
    assert stages == {
        ("headrace-prefill", "prefill-0"): sorted(["queue", "prefill"] * 2),
        ("headrace-decode", "decode-0/0"): sorted(["reserve", "hand-over", "decode"] * 2),
    }
    assert sorted(span["name"] for span in ours) == ["read", "read", "wait", "wait"]
    for span in (*ours, *(span for spans in by_worker.values() for span in spans)):
        assert span["parentSpanId"] == whole["spanId"]
        assert int(whole["startTimeUnixNano"]) <= int(span["startTimeUnixNano"])
        assert int(span["endTimeUnixNano"]) <= int(whole["endTimeUnixNano"])
    assert "secret" not in json.dumps(collector.received)


async def test_a_trace_that_its_caller_does_not_record_gets_no_spans() -> None:
    collector = Collector()
    exporter = collector.exporter()
    async with asked_of(exporter) as (client, _):
        for flags in ("00", "02"):
            headers = {"traceparent": f"00-{TRACE.trace_id}-{TRACE.parent_id}-{flags}"}
            answer = await client.post("/v1/completions", json=BODY, headers=headers)
            assert answer.headers["traceparent"].endswith(flags)
    await exporter.export()
    assert not any(spans_by_worker(collector).values())


async def test_a_refused_request_is_a_span_in_its_callers_trace_too() -> None:
    collector = Collector()
    exporter = collector.exporter()
    headers = {"traceparent": f"00-{TRACE.trace_id}-{TRACE.parent_id}-01"}
    async with asked_of(exporter) as (client, _):
        body = {**BODY, "temperature": "secret"}
        answer = await client.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 400
    await exporter.export()
    (span,) = spans_by_worker(collector)["headrace-gateway", ""]
    assert span["parentSpanId"] == TRACE.parent_id
    assert answer.headers["traceparent"].split("-")[2] == span["spanId"]
    assert span["status"] == {"code": 2, "message": "refused: invalid_value"}
    assert "secret" not in json.dumps(collector.received)


@pytest.mark.parametrize(
    ("more", "status", "why"),
    [
        ({"authorization": "Bearer wrong"}, 401, "refused: invalid_api_key"),
        ({"content-length": "1000000000"}, 413, "refused: 413"),
        ({f"x-{i}": "1" for i in range(100)}, 431, "refused: 431"),
    ],
)
async def test_a_request_that_is_not_admitted_is_a_span_in_its_callers_trace(
    more: dict[str, str], status: int, why: str, tmp_path: Path
) -> None:
    collector = Collector()
    exporter = collector.exporter()
    keys = tmp_path / "keys"
    keys.write_text("k")
    app = create_app(
        ScriptedGenerator(text=byte_model_text()),
        byte_model_text(),
        GatewaySettings(api_keys_file=keys),
        spans=exporter,
    )
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        for flags in ("00", "01"):
            trace = {"traceparent": f"00-{TRACE.trace_id}-{TRACE.parent_id}-{flags}"}
            headers = {"authorization": "Bearer k", **trace, **more}
            answer = await client.post("/v1/secret-path", headers=headers, content=b"{}")
            assert answer.status_code == status
    await exporter.export()
    (span,) = spans_by_worker(collector)["headrace-gateway", ""]
    assert (span["name"], span["status"]) == ("admission", {"code": 2, "message": why})
    assert span["parentSpanId"] == TRACE.parent_id
    assert answer.headers["traceparent"].split("-")[2] == span["spanId"]
    assert "secret" not in json.dumps(collector.received)


async def test_the_callers_trace_state_is_on_every_span_of_its_request() -> None:
    collector = Collector()
    exporter = collector.exporter()
    trace = f"00-{TRACE.trace_id}-{TRACE.parent_id}-01"
    headers = [("traceparent", trace), ("tracestate", "rojo=1,congo=t61"), ("tracestate", "a@b=z")]
    async with asked_of(exporter) as (client, _):
        answer = await client.post("/v1/completions", json=BODY, headers=headers)
        assert answer.status_code == 200
        refused = await client.post("/v1/completions", json={}, headers=headers)
        assert refused.status_code == 400
    await exporter.export()
    spans = [span for of_it in spans_by_worker(collector).values() for span in of_it]
    assert len(spans) > 6
    assert {span["traceState"] for span in spans} == {"rojo=1,congo=t61,a@b=z"}


async def test_a_request_that_failed_says_why_in_its_span_and_in_the_stage_where_it_ended() -> None:
    collector = Collector()
    exporter = collector.exporter()
    async with asked_of(exporter) as (client, system):
        system.prefill[0].silent = True
        headers = {"x-request-timeout": "0.05"}
        answer = await client.post("/v1/completions", json=BODY, headers=headers)
    assert answer.status_code == 504
    await exporter.export()
    found = [span for of_it in spans_by_worker(collector).values() for span in of_it]
    failed = [span for span in found if span["status"]["code"] == 2]
    whole, stage = sorted(failed, key=lambda span: span["kind"], reverse=True)
    assert whole["name"] == f"completions {MODEL}"
    assert stage["parentSpanId"] == whole["spanId"]
    assert whole["status"]["message"] == stage["status"]["message"] != ""
    assert int(stage["endTimeUnixNano"]) == max(
        int(span["endTimeUnixNano"]) for span in found if span is not whole
    )
