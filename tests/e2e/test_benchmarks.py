"""Every benchmark runs to its end and prints the line that it promises, whatever it measures."""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
QUICK = (
    "engine",
    "gateway",
    "interference",
    "kv_transfer",
    "load_accuracy",
    "load_client",
    "wide_ep",
)
FLAGS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(QUICK, ("--quick",)),
    "prefill_ranks": ("--tokens", "1024", "--rounds", "1"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_benchmark_ends_with_its_line_of_json(name: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *FLAGS[name]]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280)
    assert ended.stdout, ended.stderr[-2000:]
    report = json.loads(ended.stdout.splitlines()[-1])
    assert report["benchmark"] == name
    assert report["figures"]
    holds = [bar["holds"] for bar in report["bars"]]
    assert ended.returncode == (0 if all(holds) else 1)
    for bar in report["bars"]:
        assert isinstance(bar["value"], int | float), bar
        assert isinstance(bar["limit"], int | float), bar
