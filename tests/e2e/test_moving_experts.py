"""Experts move between the ranks of a running system; clients see nothing, operators do."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from transformers import AutoModelForCausalLM

from engine.experts.recorded_load import parse_load
from tests.e2e.conftest import Start
from tests.e2e.test_greedy_tokens import a_prompt, completion, greedy, token_ids

pytestmark = pytest.mark.timeout(300)
EXPERTS = ("--set", "decode.experts.redundant=5")
MOVING = (
    "--set",
    "decode.experts.rebalance=true",
    "--set",
    "decode.experts.rebalance_window=2",
    "--set",
    "decode.experts.rebalance_interval=3",
    "--set",
    "decode.experts.rebalance_above=1.0",
)
FLAGS = ("--dtype", "float32", "--kv-cache", "16MiB", "--decode-ranks", "3", *EXPERTS)


def status(url: str, *options: str) -> dict[str, object]:
    command = [sys.executable, "-m", "deploy.cli", "status", url, "--json", *options]
    ended = subprocess.run(command, capture_output=True, timeout=60, check=True)
    found: dict[str, object] = msgspec.json.decode(ended.stdout)
    return found


def experts_moved(url: str) -> int:
    """As soon as the gateway has heard of any; workers report once a second."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        groups = status(url, "--experts")["experts"]
        assert isinstance(groups, dict)
        if groups and groups["decode-0"]["migrations"] > 0:
            return int(groups["decode-0"]["migrations"])
    return 0


def test_tokens_are_those_of_transformers_while_experts_move(
    start: Start, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint("deepseek_v3")
    system = start(folder, *FLAGS, *MOVING)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    prompts = [a_prompt(length, 300, seed) for seed, length in enumerate((5, 40, 17))]

    for prompt in prompts:
        answer = completion(system.url, folder.name, prompt)
        assert token_ids(answer) == greedy(model, prompt)

    assert experts_moved(system.url) > 0
    file = tmp_path / "load.json"
    status(system.url, "--record", str(file))
    assert set(parse_load(file.read_bytes(), str(file)).layers) == {1, 2}
