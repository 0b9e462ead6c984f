"""Experts move between the ranks of a running system; clients see nothing, operators do."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
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


def streamed(url: str, model: str, on_chunk: Callable[[int], None]) -> str:
    body = {
        "model": model,
        "prompt": a_prompt(9, 300, seed=4),
        "max_tokens": 120,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    lines: list[str] = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                lines.append(line.removeprefix("data: "))
                on_chunk(len(lines))
    assert lines[-1] == "[DONE]"
    chunks = [msgspec.json.decode(line) for line in lines[:-1]]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def test_a_rank_killed_while_experts_move_changes_no_token(
    start: Start, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """It starts again with the first placement, and is told where they are now."""
    folder = tiny_checkpoint("deepseek_v3")
    system = start(folder, *FLAGS, *MOVING)

    def kill(count: int) -> None:
        if count == 60:
            system.processes("decode")[1].send_signal(signal.SIGKILL)

    undisturbed = streamed(system.url, folder.name, lambda _: None)
    assert streamed(system.url, folder.name, kill) == undisturbed
    assert streamed(system.url, folder.name, lambda _: None) == undisturbed
    assert experts_moved(system.url) > 0
