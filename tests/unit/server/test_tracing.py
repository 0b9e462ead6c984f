import re

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from pydantic import ValidationError

from server.metrics_compat import VllmAliases
from server.settings import GatewaySettings
from server.tracing import trace_of
from tests.support.system import a_system

TRACE = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_a_trace_goes_on_with_a_span_of_ours() -> None:
    ours = trace_of({b"traceparent": TRACE})
    assert ours is not None
    assert ours.trace_id == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert re.fullmatch(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-01", ours.traceparent)
    assert ours.span_id != "00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("given", "flags", "sampled"),
    [(TRACE, "01", True), (TRACE[:-2] + b"00", "00", False), (TRACE[:-2] + b"02", "02", False)],
)
def test_whether_the_caller_records_its_trace_is_passed_on(
    given: bytes, flags: str, sampled: bool
) -> None:
    ours = trace_of({b"traceparent": given})
    assert ours is not None
    assert (ours.flags, ours.sampled) == (flags, sampled)


def test_of_a_later_version_what_ours_has_too_is_kept() -> None:
    ours = trace_of({b"traceparent": b"01" + TRACE[2:-2] + b"f1-and-more"})
    assert ours is not None
    assert ours.trace_id == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert ours.traceparent == b"00-" + TRACE[3:35] + b"-" + ours.span_id.encode() + b"-01"


@pytest.mark.parametrize(
    "given",
    [b"", b"x", b"00-" + b"0" * 32 + TRACE[35:], TRACE.upper(), b"ff" + TRACE[2:], TRACE + b"-x"],
)
def test_what_is_no_trace_is_left_alone(given: bytes) -> None:
    assert trace_of({b"traceparent": given}) is None


def state_of(*lines: bytes, trace: bytes = TRACE) -> str | None:
    """What is kept of a request's ``tracestate``; None where there is no trace."""
    headers = [(b"traceparent", trace), *((b"tracestate", line) for line in lines)]
    ours = trace_of(dict(headers), headers)
    return None if ours is None else ours.state


def test_the_trace_state_is_kept_as_it_came_from_however_many_lines() -> None:
    assert state_of() == state_of(b"", b" ,\t") == ""
    assert state_of(b"rojo=00f067aa0ba902b7 , congo=t61rcWkgMzE", b"t/1@x*-_=a b!~") == (
        "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE,t/1@x*-_=a b!~"
    )
    assert state_of(b",".join(b"k%d=v" % i for i in range(32))) != ""
    assert state_of(b"a=" + b"x" * 256) == "a=" + "x" * 256
    assert state_of(b"a=1", trace=b"x") is None


@pytest.mark.parametrize(
    "lines",
    [
        (b"a",),
        (b"a=",),
        (b"=1",),
        (b"A=1",),
        (b"a=1=2",),
        (b"a=1;b=2,c",),
        (b"a b=1",),
        (b"a=\xc3\xa9",),
        (b"a=\x7f",),
        (b"a=1,a=2",),
        (b"a=1", b"b"),
        (b"k" * 257 + b"=1",),
        (b"a=" + b"x" * 257,),
        (b",".join(b"k%d=v" % i for i in range(33)),),
        (b"a=" + b"x" * 250, b"b=" + b"x" * 250, b"c=" + b"x" * 10),
    ],
)
def test_a_trace_state_that_is_malformed_or_too_long_is_dropped(lines: tuple[bytes, ...]) -> None:
    assert state_of(*lines) == ""


@pytest.mark.anyio
async def test_autoscalers_find_the_names_they_know() -> None:
    async with a_system() as system:
        registry = CollectorRegistry()
        registry.register(VllmAliases(system.serving.cluster))
        shown = generate_latest(registry).decode()
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert f'vllm:{name}{{model_name="arithmetic"}} 0.0' in shown


@pytest.mark.parametrize("endpoint", ["collector:4318", "http://", "http://x:99999", "ftp://x", ""])
def test_a_collector_without_a_base_url_is_refused_when_the_gateway_starts(endpoint: str) -> None:
    with pytest.raises(ValidationError, match="is no base URL"):
        GatewaySettings(otlp_endpoint=endpoint)
