"""Traces of a really running system, as a collector gets them over OTLP/HTTP."""

import itertools
import json
import secrets
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from benchmarks.local_system import LocalSystem
from tests.e2e.conftest import Start
from tests.e2e.test_faults import FLAGS, attempts_in_flight, eventually, ready

pytestmark = pytest.mark.timeout(300)
PARENT = "00f067aa0ba902b7"
BODY = {"model": "smollm2", "prompt": "Once upon a time", "max_tokens": 5, "ignore_eos": True}
OF_AN_ATTEMPT = [
    ("headrace-gateway", "wait"),
    ("headrace-decode", "reserve"),
    ("headrace-prefill", "queue"),
    ("headrace-prefill", "prefill"),
    ("headrace-decode", "hand-over"),
    ("headrace-decode", "decode"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """As it came: ``begin`` and ``end`` in nanoseconds, ``status`` 1 for ok and 2 for error."""

    service: str
    worker: str
    name: str
    span_id: str
    parent: str
    begin: int
    end: int
    status: int
    message: str
    attempt: int


@dataclass
class Collector:
    url: str = ""
    spans: dict[str, list[Span]] = field(default_factory=dict)  # by trace id

    def take(self, body: Any) -> None:
        for resource in body["resourceSpans"]:
            named = _values(resource["resource"]["attributes"])
            for span in (span for scope in resource["scopeSpans"] for span in scope["spans"]):
                one = Span(
                    service=named["service.name"],
                    worker=named.get("service.instance.id", ""),
                    name=span["name"],
                    span_id=span["spanId"],
                    parent=span.get("parentSpanId", ""),
                    begin=int(span["startTimeUnixNano"]),
                    end=int(span["endTimeUnixNano"]),
                    status=span["status"]["code"],
                    message=span["status"].get("message", ""),
                    attempt=int(_values(span["attributes"]).get("headrace.attempt", "0")),
                )
                self.spans.setdefault(span["traceId"], []).append(one)

    def trace(self, trace_id: str) -> tuple[Span, list[Span]]:
        """The request's span and its children by time, once they have come."""
        eventually(lambda: trace_id in self.spans, "spans of the trace")
        (whole,) = (span for span in self.spans[trace_id] if span.parent == PARENT)
        stages = sorted(
            (span for span in self.spans[trace_id] if span is not whole),
            key=lambda span: (span.begin, span.end),
        )
        assert {span.parent for span in stages} == {whole.span_id}
        assert all(whole.begin <= s.begin <= s.end <= whole.end for s in stages)
        return whole, stages


def _values(attributes: Any) -> dict[str, str]:
    return {a["key"]: str(next(iter(a["value"].values()))) for a in attributes}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    found = Collector()

    class Endpoint(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            assert self.headers["content-type"] == "application/json"
            found.take(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        found.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield found
        server.shutdown()
        thread.join()


@pytest.fixture
def system(start: Start, collector: Collector) -> LocalSystem:
    running = start("smollm2", *FLAGS, "--set", f"gateway.otlp_endpoint={collector.url}")
    eventually(lambda: ready(running), "ready")
    return running


def ask(system: LocalSystem, *, flags: str = "01", timeout: str = "60", **more: object) -> str:
    """The id of the request's trace. It is answered whole, or with 504."""
    trace_id = secrets.token_hex(16)
    headers = {"traceparent": f"00-{trace_id}-{PARENT}-{flags}", "x-request-timeout": timeout}
    url = f"{system.url}/v1/completions"
    answer = httpx.post(url, json={**BODY, **more}, headers=headers, timeout=120)
    assert answer.status_code in (200, 504), answer.text
    version, same_trace, ours, same_flags = answer.headers["traceparent"].split("-")
    assert (version, same_trace, same_flags) == ("00", trace_id, flags)
    assert ours != PARENT
    return trace_id


def test_a_request_is_seen_at_every_stage_in_its_callers_trace(
    system: LocalSystem, collector: Collector
) -> None:
    unrecorded = ask(system, flags="00")
    whole, stages = collector.trace(ask(system))
    assert (whole.service, whole.name, whole.status) == (
        "headrace-gateway",
        "completions smollm2",
        1,
    )
    assert [(s.service, s.name) for s in stages] == [("headrace-gateway", "read"), *OF_AN_ATTEMPT]
    assert all(s.status == 1 for s in stages)
    workers = {(s.service, s.worker.split("/")[0]) for s in stages}
    assert workers == {
        ("headrace-gateway", ""),
        ("headrace-prefill", "prefill-0"),
        ("headrace-decode", "decode-0"),
    }
    in_turn = stages[1:]
    assert all(abs(a.end - b.begin) < 1000 for a, b in itertools.pairwise(in_turn))
    assert unrecorded not in collector.spans


def test_a_request_whose_time_ran_out_says_where(system: LocalSystem, collector: Collector) -> None:
    whole, stages = collector.trace(ask(system, timeout="0.3", max_tokens=1000))
    assert whole.status == 2
    assert "time" in whole.message
    assert [s.status for s in stages] == [1] * (len(stages) - 1) + [2]
    assert stages[-1].message == whole.message


@pytest.mark.slow
def test_a_migrated_stream_is_one_trace_with_both_attempts(
    system: LocalSystem, collector: Collector
) -> None:
    trace_id = secrets.token_hex(16)
    body = {**BODY, "max_tokens": 80, "stream": True}
    headers = {"traceparent": f"00-{trace_id}-{PARENT}-01"}
    url, events = f"{system.url}/v1/completions", 0
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as answer:
        for line in answer.iter_lines():
            events += line.startswith("data: ")
            if events == 4 and line:
                system.processes("decode")[-1].send_signal(signal.SIGKILL)
    whole, (_, *stages) = collector.trace(trace_id)
    assert whole.status == 1
    attempts = [[s for s in stages if s.attempt == number] for number in (1, stages[-1].attempt)]
    for attempt in attempts:
        assert [(s.service, s.name) for s in attempt] == OF_AN_ATTEMPT
    first, last = attempts
    assert first[-1].status == 2
    assert first[-1].message
    assert all(s.status == 1 for s in (*first[:-1], *last))
    assert first[-1].end <= last[0].begin


@pytest.mark.slow
def test_a_collector_that_is_away_costs_nobody_anything(start: Start) -> None:
    system = start("smollm2", *FLAGS, "--set", "gateway.otlp_endpoint=http://127.0.0.1:9")
    eventually(lambda: ready(system), "ready")
    for _ in range(40):
        ask(system, max_tokens=2)
        eventually(lambda: attempts_in_flight(system) == 0, "nothing in flight")
    eventually(lambda: "spans are dropped" in system.output(), "a line of the log")
    assert system.output().count("spans are") == 1
