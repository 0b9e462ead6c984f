"""``headrace status --links``: how KV goes from each prefill rank to each decode rank, and why.

From the gateway's metrics. A link shows up with its first request; that of a rank that is not its
worker's first one, some seconds later.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

_METRIC = "headrace_link_"
_COLUMNS = (
    "prefill",
    "decode",
    "transport",
    "sent",
    "seconds",
    "MB/s",
    "probe MB/s",
    "lost",
    "why",
)


@dataclass(slots=True)
class LinkState:
    """``bytes_per_second`` of what has been sent; the probe's figure is from when it came up."""

    transport: str = ""
    reason: str = ""
    bytes: float = 0
    seconds: float = 0
    measured_bytes_per_second: float = 0
    expected_bytes_per_second: float = 0
    lost: float = 0

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds if self.seconds else 0.0


def links_in(metrics: str) -> dict[str, LinkState]:
    """By "prefill > decode", from the text of /metrics."""
    links: dict[str, LinkState] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if not sample.name.startswith(_METRIC) or "decode" not in sample.labels:
                continue
            pair = f"{sample.labels['prefill']} > {sample.labels['decode']}"
            link = links.setdefault(pair, LinkState())
            name = sample.name.removeprefix(_METRIC).removesuffix("_total")
            if name == "info":
                link.transport, link.reason = sample.labels["transport"], sample.labels["reason"]
            elif hasattr(link, name):
                setattr(link, name, sample.value)
    return links


def lines_of_links(links: Mapping[str, LinkState]) -> list[str]:
    if not links:
        return ["", "no links yet: the first request of a pair brings its link up"]
    rows = [list(_COLUMNS), *(_row(pair, link) for pair, link in sorted(links.items()))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return [
        "",
        *(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ),
    ]


def _row(pair: str, link: LinkState) -> list[str]:
    prefill, decode = pair.split(" > ")
    return [
        prefill,
        decode,
        link.transport,
        f"{link.bytes / 1e6:.1f} MB",
        f"{link.seconds:.2f}",
        f"{link.bytes_per_second / 1e6:.0f}",
        f"{link.measured_bytes_per_second / 1e6:.0f}",
        f"{link.lost:.0f}",
        link.reason,
    ]
