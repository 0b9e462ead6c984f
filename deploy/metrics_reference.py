"""The metrics reference, written from what a gateway really exports.

    python3 -m deploy.metrics_reference > docs/metrics.md

A test compares the page with this module's output, and every expression of the dashboards and
alerts with ``series``. No worker takes part: families without samples have names and labels too.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass

import anyio
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import Metric

from server.metrics import HttpMetrics, Latencies
from server.metrics_compat import VllmAliases
from server.serving import open_serving
from server.spans import DroppedSpans, SpanExporter

_SERIES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
_TO_WORKERS = "The gateway's way to the workers"
_SECTIONS = {
    "headrace_worker_": ("Workers", "By each worker's own account, as of its last heartbeat."),
    "headrace_link_": (
        "Links",
        "KV from prefill workers to the decode ranks that they have reached.",
    ),
    "headrace_expert_": ("Experts", "Of models whose tokens choose among experts."),
    "headrace_gateway_": (_TO_WORKERS, ""),
    "headrace_": ("Requests", ""),
    "vllm:": ("Aliases", "With `--metrics-compat vllm`, for autoscalers that know these names."),
}
_HEAD = """# Metrics

What a gateway exports at `/metrics`, behind the same API keys as the API. Workers export nothing
themselves: they tell the scheduler, and it the gateways. This page is generated:
`python3 -m deploy.metrics_reference > docs/metrics.md`.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """``name`` is as in dashboards: a counter's ends in _total, a histogram's has no suffix."""

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str

    @property
    def series(self) -> tuple[str, ...]:
        """The names that an expression can use."""
        base = self.name.removesuffix("_total") if self.kind == "counter" else self.name
        return tuple(f"{base}{suffix}" for suffix in _SERIES[self.kind])


def families() -> list[Family]:
    """Every family that a gateway may export, by name."""
    return sorted(anyio.run(_collected), key=lambda family: family.name)


async def _collected() -> list[Family]:
    http = vars(HttpMetrics(CollectorRegistry())).values()
    collectors = [part for part in http if isinstance(part, Counter | Gauge | Latencies)]
    found = [_family(metric, of) for of in collectors for metric in of.collect()]
    registry = CollectorRegistry()
    async with open_serving(
        "tcp://127.0.0.1:0", embed_scheduler=True, registry=registry
    ) as serving:
        registry.register(VllmAliases(serving.cluster))
        registry.register(DroppedSpans(SpanExporter("http://127.0.0.1")))
        found += [_family(metric, metric) for metric in registry.collect()]
    return found


def _family(metric: Metric, labelled: object) -> Family:
    name = f"{metric.name}_total" if metric.type == "counter" else metric.name
    # The client library keeps label names to itself where there is no sample.
    labels = tuple(getattr(labelled, "_labelnames", ()))
    return Family(name=name, kind=metric.type, labels=labels, meaning=metric.documentation)


def page(known: Iterable[Family]) -> str:
    """The Markdown page."""
    rest = list(known)
    sections = {}
    for prefix, (title, text) in _SECTIONS.items():
        own = [family for family in rest if family.name.startswith(prefix)]
        rest = [family for family in rest if family not in own]
        rows = "\n".join(_row(family) for family in own)
        lead = f"{text}\n\n" if text else ""
        sections[title] = (
            f"## {title}\n\n{lead}| name | kind | labels | meaning |\n|---|---|---|---|\n{rows}\n"
        )
    assert not rest
    order = ("Requests", _TO_WORKERS, "Workers", "Links", "Experts", "Aliases")
    return "\n".join([_HEAD, *(sections[title] for title in order)])


def _row(family: Family) -> str:
    labels = ", ".join(f"`{label}`" for label in family.labels)
    return f"| `{family.name}` | {family.kind} | {labels} | {family.meaning} |"


if __name__ == "__main__":
    sys.stdout.write(page(families()))
