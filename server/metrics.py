"""What the gateway's HTTP surface counts, and the table of all names.

    headrace_http_requests_total{endpoint,outcome}    answered requests
    headrace_http_requests_in_flight{endpoint}        being answered now
    headrace_http_request_seconds                     arrival to last byte
    headrace_time_to_first_token_seconds              arrival to first token, streamed or not
    headrace_inter_token_latency_seconds              between the tokens of one choice
    headrace_prompt_tokens_total                      of requests that began to generate
    headrace_cached_prompt_tokens_total               of those, found in a prefix cache
    headrace_completion_tokens_total                  generated and paid for, shown or not
    headrace_client_disconnects_total                 clients that left before their answer's end

``endpoint`` is chat, completions, responses or messages. ``outcome`` is ok, client_error (4xx),
overloaded (503), server_error (other 5xx, or an error event) or disconnected. No label holds
anything of a caller's.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from itertools import accumulate
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

Endpoint = Literal["chat", "completions", "responses", "messages"]
RequestOutcome = Literal["ok", "client_error", "overloaded", "server_error", "disconnected"]

_TTFT_BOUNDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
_ITL_BOUNDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 5.0)
_REQUEST_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0)


class Latencies(Collector):
    """A histogram for one writer thread: the library's own takes a lock and a linear search for
    every observation, which once a token is a tenth of the gateway's time.
    """

    def __init__(self, name: str, help_text: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._help = help_text
        self._bounds = tuple(bounds)
        self._counts = array("q", [0] * (len(bounds) + 1))
        self._sum = array("d", [0.0])

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum[0] += seconds

    def memory(self) -> "tuple[array[int], array[float]]":
        """Observations by bucket, and their sum, for compiled code to add to."""
        return self._counts, self._sum

    def counts(self) -> tuple[int, ...]:
        """Observations by bucket since the start, the last one above all ``bounds``."""
        return tuple(self._counts)

    @property
    def bounds(self) -> tuple[float, ...]:
        return self._bounds

    def collect(self) -> Iterable[Metric]:
        labels = [*map(str, self._bounds), "+Inf"]
        buckets = list(zip(labels, map(float, accumulate(self._counts)), strict=True))
        family = HistogramMetricFamily(self._name, self._help)
        family.add_metric([], buckets=buckets, sum_value=self._sum[0])
        yield family


class HttpMetrics:
    """Registers itself with ``registry``, which /metrics shows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "headrace_http_requests",
            "Answered requests",
            ("endpoint", "outcome"),
            registry=registry,
        )
        self.in_flight = Gauge(
            "headrace_http_requests_in_flight",
            "Requests being answered now",
            ("endpoint",),
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "headrace_prompt_tokens", "Prompt tokens of generating requests", registry=registry
        )
        self.cached_tokens = Counter(
            "headrace_cached_prompt_tokens", "Prompt tokens from a prefix cache", registry=registry
        )
        self.completion_tokens = Counter(
            "headrace_completion_tokens", "Generated tokens", registry=registry
        )
        self.disconnects = Counter(
            "headrace_client_disconnects", "Clients that left early", registry=registry
        )
        self.first_token = Latencies(
            "headrace_time_to_first_token_seconds", "Arrival to first token", _TTFT_BOUNDS
        )
        self.token_gap = Latencies(
            "headrace_inter_token_latency_seconds", "Between tokens of a choice", _ITL_BOUNDS
        )
        self.request_time = Latencies(
            "headrace_http_request_seconds", "Arrival to last byte", _REQUEST_BOUNDS
        )
        for latencies in (self.first_token, self.token_gap, self.request_time):
            registry.register(latencies)


def outcome_of(status: int) -> RequestOutcome:
    if status < HTTPStatus.BAD_REQUEST:
        return "ok"
    if status < HTTPStatus.INTERNAL_SERVER_ERROR:
        return "client_error"
    return "overloaded" if status == HTTPStatus.SERVICE_UNAVAILABLE else "server_error"
