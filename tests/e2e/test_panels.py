"""Every panel of the dashboards has data: a real Prometheus scrapes a system under load.

Grafana itself is not asked: what a panel shows is what its expression gives, and that is evaluated
here as Grafana would, with the variables filled in.
"""

import json
import math
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from benchmarks.local_system import free_port
from tests.e2e.conftest import Start
from tests.e2e.test_greedy_tokens import a_prompt
from tests.e2e.test_moving_experts import FLAGS, MOVING

PROMETHEUS = shutil.which("prometheus")
ROOT = Path(__file__).parents[2]
SOON_S = 60.0
CALLERS = 3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(PROMETHEUS is None, reason="needs Prometheus"),
]


@pytest.fixture
def scraped(start: Start, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Iterator[str]:
    """The URL of a Prometheus with our configuration, but for the address and the key; the system
    that it scrapes is asked until the test ends."""
    assert PROMETHEUS is not None
    folder = tiny_checkpoint("deepseek_v3")
    system = start(folder, *FLAGS, *MOVING)
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yaml").read_text())
    (job,) = config["scrape_configs"]
    del job["authorization"]
    job["static_configs"] = [{"targets": [system.url.removeprefix("http://")]}]
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(ROOT / "deploy/prometheus/alerts.yaml")]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    ended = threading.Event()
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(
            [
                PROMETHEUS,
                f"--config.file={tmp_path / 'prometheus.yaml'}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        ) as prometheus,
        ThreadPoolExecutor(CALLERS) as callers,
    ):
        asking = [callers.submit(ask, system.url, folder.name, n, ended) for n in range(CALLERS)]
        try:
            yield f"http://{address}"
        finally:
            ended.set()
            prometheus.terminate()
    assert all(one.result() for one in asking), "a caller was never answered"


def ask(url: str, model: str, seed: int, ended: threading.Event) -> int:
    """Ask the same again and again, so that prefixes are found; the number of answers."""
    count = 0
    prompt = a_prompt(40, 300, seed=seed)
    body = {"model": model, "prompt": prompt, "max_tokens": 24, "ignore_eos": True}
    while not ended.is_set():
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        answer.raise_for_status()
        count += 1
    return count


def result(prometheus: str, expression: str) -> list[float]:
    """The values that the expression has now, without those that are no number."""
    with suppress(httpx.TransportError):
        answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": expression}, timeout=10)
        if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
            found = answer.json()
            assert found["status"] == "success", (expression, found)
            values = [float(series["value"][1]) for series in found["data"]["result"]]
            return [value for value in values if not math.isnan(value)]
    return []


def panels() -> list[tuple[str, str]]:
    documents: list[dict[str, Any]] = [
        json.loads(file.read_text())
        for file in sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
    ]
    return [
        (f"{document['title']}: {panel['title']}", target["expr"])
        for document in documents
        for panel in document["panels"]
        for target in panel["targets"]
    ]


def test_every_panel_has_data_and_every_alert_can_be_evaluated(scraped: str) -> None:
    variables = {"$__rate_interval": "15s", "$group": "decode-0", "$layer": "1"}
    empty: list[tuple[str, str]] = []
    for where, written in panels():
        expression = written
        for name, value in variables.items():
            expression = expression.replace(name, value)
        deadline = time.monotonic() + SOON_S
        while not (values := result(scraped, expression)) and time.monotonic() < deadline:
            time.sleep(0.2)
        if not values:
            empty.append((where, expression))
    assert empty == []

    groups = httpx.get(f"{scraped}/api/v1/rules", timeout=10).json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"]: rule["health"] for rule in rules if rule["health"] != "ok"} == {}
    assert len(rules) > 3
