"""``headrace status``: what a running system serves, asked over HTTP like any client would.

The workers' rows are the gateway's own metrics, so the command shows what a dashboard shows.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from deploy.exits import DONE, FAILED
from deploy.expert_status import Group, groups_in, lines_of_experts, record
from deploy.link_status import LinkState, lines_of_links, links_in
from protocol.errors import ConfigError

_WORKER_METRIC = "headrace_worker_"
_COLUMNS = {
    "up": "linked",
    "ranks": "ranks",
    "running_requests": "running",
    "queued_requests": "queued",
    "blocks_free": "free blocks",
    "blocks_cached": "cached",
    "blocks_total": "of",
    "tokens_per_second": "tokens/s",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """``workers``: for each its role and its figures by the name of their metric. ``experts``: by
    decode worker, and ``links`` by pair, where they were asked for.
    """

    url: str
    healthy: bool
    ready: bool
    reason: str
    models: Sequence[str]
    workers: dict[str, dict[str, str | float]]
    experts: dict[str, Group] | None = None
    links: dict[str, LinkState] | None = None


def show_status(
    url: str,
    *,
    as_json: bool,
    timeout_s: float,
    api_key_file: Path | None,
    experts: bool = False,
    links: bool = False,
    record_file: Path | None = None,
) -> int:
    """Print the state of the gateway at ``url``; failed when it is not ready or not there.

    With ``record_file`` the load of each expert is written there.
    """
    headers = {}
    if api_key_file is not None:
        try:
            headers["authorization"] = f"Bearer {api_key_file.read_text().split()[0]}"
        except (OSError, IndexError):
            print(f"headrace: no API key in {api_key_file}", file=sys.stderr)
            return FAILED
    try:
        with httpx.Client(timeout=timeout_s, trust_env=False, headers=headers) as client:
            wanted = experts or record_file is not None
            state = ask(client, url.rstrip("/"), experts=wanted, links=links)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        print(f"headrace: no gateway answers at {url}: {error}", file=sys.stderr)
        return FAILED
    if record_file is not None:
        try:
            record(state.experts or {}, record_file)
        except ConfigError as error:
            print(f"headrace: {error}", file=sys.stderr)
            return FAILED
    print(json.dumps(asdict(state), indent=2) if as_json else "\n".join(lines_of(state)))
    return DONE if state.ready else FAILED


def ask(client: httpx.Client, url: str, *, experts: bool = False, links: bool = False) -> State:
    """
    Raises:
        HTTPError: nobody answers at ``url``, or not in time.
        ValueError: whoever answers there is not a gateway of headrace.
    """
    ready = client.get(f"{url}/ready")
    try:
        readiness = ready.json()
    except ValueError:
        readiness = None
    if not isinstance(readiness, dict) or "ready" not in readiness:
        raise ValueError("this is not a gateway of headrace")
    models = client.get(f"{url}/v1/models")
    metrics = client.get(f"{url}/metrics")
    return State(
        url=url,
        healthy=client.get(f"{url}/health").is_success,
        ready=ready.is_success,
        reason=str(readiness.get("reason") or ""),
        models=[model["id"] for model in models.json()["data"]] if models.is_success else [],
        workers=_workers(metrics.text) if metrics.is_success else {},
        experts=groups_in(metrics.text) if experts and metrics.is_success else None,
        links=links_in(metrics.text) if links and metrics.is_success else None,
    )


def _workers(metrics: str) -> dict[str, dict[str, str | float]]:
    workers: dict[str, dict[str, str | float]] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if not sample.name.startswith(_WORKER_METRIC) or "worker" not in sample.labels:
                continue
            row = workers.setdefault(sample.labels["worker"], {})
            row["role"] = sample.labels.get("role", "")
            name = sample.name.removeprefix(_WORKER_METRIC)
            if "state" in sample.labels:
                name = f"{name}_{sample.labels['state']}"
            row[name] = sample.value
    return dict(sorted(workers.items()))


def lines_of(state: State) -> list[str]:
    word = "ready" if state.ready else f"not ready: {state.reason}"
    lines = [f"{state.url}  {word}", f"models: {', '.join(state.models) or 'none'}"]
    if not state.workers:
        return [*lines, "no workers"]
    rows = [["worker", "role", *_COLUMNS.values()]]
    for name, figures in state.workers.items():
        cells = {column: _cell(figures.get(column)) for column in _COLUMNS}
        group, _, rank = name.rpartition("/")
        there = sum(other.rpartition("/")[0] == group for other in state.workers)
        if group and rank and there < float(figures.get("ranks", there)):
            cells["ranks"] = f"{there} of {cells['ranks']}"
        rows.append([name, str(figures["role"]), *cells.values()])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    lines = [*lines, "", *table]
    if state.links is not None:
        lines += lines_of_links(state.links)
    return lines if state.experts is None else [*lines, *lines_of_experts(state.experts)]


def _cell(value: str | float | None) -> str:
    return "" if value is None else f"{value:.0f}" if isinstance(value, float) else str(value)
