import re

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from server.metrics_compat import VllmAliases
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
    "given",
    [b"", b"x", b"00-" + b"0" * 32 + TRACE[35:], TRACE.upper(), b"ff" + TRACE[2:], TRACE + b"-x"],
)
def test_what_is_no_trace_is_left_alone(given: bytes) -> None:
    assert trace_of({b"traceparent": given}) is None


@pytest.mark.anyio
async def test_autoscalers_find_the_names_they_know() -> None:
    async with a_system() as system:
        registry = CollectorRegistry()
        registry.register(VllmAliases(system.serving.cluster))
        shown = generate_latest(registry).decode()
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert f'vllm:{name}{{model_name="arithmetic"}} 0.0' in shown
