"""Dashboards and alerts ask for nothing that a gateway does not export."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from deploy.metrics_reference import families, page

ROOT = Path(__file__).parents[3]
DASHBOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
ALERTS = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yaml").read_text())
FAMILIES = families()
PROMETHEUS_OWN = {"up": {"job", "instance"}}
LABELS: Mapping[str, set[str]] = PROMETHEUS_OWN | {
    series: {*family.labels, *(["le"] if series.endswith("_bucket") else [])}
    for family in FAMILIES
    for series in family.series
}

_STRING = re.compile(r'"[^"]*"')
_GROUPING = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)?\{([^}]*)\}")
_NAME = re.compile(r"(?<![\w:$.])[a-zA-Z_:][\w:]*(?![\w:]|\s*\()")
_WORDS = {"and", "or", "unless", "bool", "offset"}


def expressions() -> Iterator[tuple[str, str]]:
    for file in DASHBOARDS:
        document = json.loads(file.read_text())
        for panel in document["panels"]:
            for target in panel["targets"]:
                yield f"{file.stem}: {panel['title']}", target["expr"]
        for variable in document["templating"]["list"]:
            asked = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"])
            assert asked is not None
            # As an expression, so that the label must be one of the metric's.
            yield f"{file.stem}: ${variable['name']}", f"count by ({asked[2]}) ({asked[1]})"
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            yield f"alert {rule['alert']}", rule["expr"]


def faults_in(expression: str) -> list[str]:
    """Names of series and labels that nothing exports."""
    plain = _STRING.sub('""', expression)
    grouped = {
        label for _, inner in _GROUPING.findall(plain) for label in re.findall(r"\w+", inner)
    }
    plain = _GROUPING.sub(" ", plain)
    plain = re.sub(r"\[[^\]]*\]", "", plain)
    faults = []
    for name, inner in _SELECTOR.findall(plain):
        matched = set(re.findall(r"(\w+)\s*[=!]", inner))
        faults += [f"{name}{{{label}}}" for label in matched - LABELS.get(name, set())]
    used = [name for name in _NAME.findall(_SELECTOR.sub(r"\1", plain)) if name not in _WORDS]
    faults += [name for name in used if name not in LABELS]
    known = set().union(*(LABELS.get(name, set()) for name in used))
    return faults + [f"by ({label})" for label in grouped - known] + ([] if used else ["no metric"])


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_every_expression_asks_for_what_is_exported(where: str, expression: str) -> None:
    assert faults_in(expression) == []


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("rate(headrace_nothing_total[5m])", "headrace_nothing_total"),
        ("headrace_worker_up + node_load1", "node_load1"),
        ('sum(headrace_worker_up{rank="1"})', "headrace_worker_up{rank}"),
        ("sum by (model) (headrace_worker_up)", "by (model)"),
        ("headrace_http_requests", "headrace_http_requests"),
        ("vector(1)", "no metric"),
    ],
    ids=["series", "somebody else's", "label", "grouping", "a counter without _total", "none"],
)
def test_an_expression_about_nothing_is_found(expression: str, fault: str) -> None:
    assert faults_in(expression) == [fault]


def test_the_metrics_reference_is_what_a_gateway_exports() -> None:
    assert (ROOT / "docs/metrics.md").read_text() == page(FAMILIES), (
        "write it again: python3 -m deploy.metrics_reference > docs/metrics.md"
    )


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_a_dashboard_can_be_provisioned(file: Path) -> None:
    document = json.loads(file.read_text())
    sources = yaml.safe_load(
        (ROOT / "deploy/grafana/provisioning/datasources/prometheus.yaml").read_text()
    )
    known = {source["uid"] for source in sources["datasources"]}
    assert {panel["datasource"]["uid"] for panel in document["panels"]} <= known
    assert document["uid"] == f"headrace-{file.stem}"
    places = [panel["gridPos"] for panel in document["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)), "panels overlap"


def test_there_is_a_dashboard_for_each_question() -> None:
    assert [file.stem for file in DASHBOARDS] == ["disaggregation", "experts", "overview"]


def test_every_alert_says_what_to_do() -> None:
    rules = [rule for group in ALERTS["groups"] for rule in group["rules"]]
    assert [rule["alert"] for rule in rules if not rule["annotations"].get("action")] == []
