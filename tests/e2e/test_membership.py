"""Decode ranks are lost and come back under load; the others go on, and no client loses a token."""

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest
from transformers import AutoModelForCausalLM

from benchmarks.local_system import LocalSystem
from tests.e2e.conftest import Start
from tests.e2e.test_greedy_tokens import a_prompt

pytestmark = pytest.mark.timeout(300)
RANKS = 4
STREAMS = 8
TOKENS = 100
FLAGS = (
    "--dtype",
    "float32",
    "--kv-cache",
    "16MiB",
    "--decode-ranks",
    str(RANKS),
    "--set",
    "decode.group.step_timeout_s=5",  # a busy machine is not a frozen rank
)


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("deepseek_v3")


@pytest.fixture(scope="module")
def wanted(folder: Path) -> list[list[int]]:
    """What transformers generates for each stream's prompt."""
    import torch

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    model.generation_config.eos_token_id = None
    found = []
    for seed in range(STREAMS):
        prompt = torch.tensor([a_prompt(5 + seed, 300, seed)])
        generated = model.generate(prompt, max_new_tokens=TOKENS, do_sample=False)
        found.append(generated[0, prompt.shape[1] :].tolist())
    return found


def stream(system: LocalSystem, model: str, seed: int, on_token: Callable[[], None]) -> list[int]:
    body = {
        "model": model,
        "prompt": a_prompt(5 + seed, 300, seed),
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "return_token_ids": True,
    }
    tokens: list[int] = []
    ended = False
    url = f"{system.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=120) as answer:
        for line in answer.iter_lines():
            data = line.removeprefix("data: ")
            ended = ended or data == "[DONE]"
            if line.startswith("data: {"):
                for choice in msgspec.json.decode(data)["choices"]:
                    tokens += choice.get("token_ids") or []
                on_token()
    assert ended
    return tokens


def all_streams(
    system: LocalSystem, model: str, at_token: int, then: Callable[[], None]
) -> list[list[int]]:
    """``then`` is called once, when the first stream has ``at_token`` events."""
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == at_token:
            then()

    with ThreadPoolExecutor(STREAMS) as threads:
        asked = [
            threads.submit(stream, system, model, seed, (lambda: None) if seed else count)
            for seed in range(STREAMS)
        ]
        return [each.result() for each in asked]


def migrations(system: LocalSystem) -> float:
    """Streams that have gone on elsewhere since the system, which tests share, was started."""
    name = "headrace_gateway_migrations_total "
    lines = httpx.get(f"{system.url}/metrics", timeout=5).text.splitlines()
    return next(float(line.removeprefix(name)) for line in lines if line.startswith(name))


def rank_process(system: LocalSystem, rank: int) -> psutil.Process:
    (found,) = (p for p in system.processes("decode") if f"decode.group.rank={rank}" in p.cmdline())
    return found


def groups(system: LocalSystem) -> list[dict[str, object]]:
    found: list[dict[str, object]] = httpx.get(f"{system.url}/status", timeout=5).json()["groups"]
    return found


def whole_again(system: LocalSystem) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        (group,) = groups(system) or [{}]
        if group.get("serving") and group.get("present") == RANKS:
            return
        time.sleep(0.1)
    raise AssertionError(f"not all ranks came back: {groups(system)}")


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_only_the_lost_rank_s_streams_move_and_no_stream_changes(
    start: Start, folder: Path, wanted: list[list[int]], how: signal.Signals, rank: int
) -> None:
    system = start(folder, *FLAGS)
    whole_again(system)
    victim, before = rank_process(system, rank), migrations(system)

    try:
        tokens = all_streams(system, folder.name, 25, lambda: victim.send_signal(how))
    finally:
        if how is signal.SIGSTOP:
            victim.send_signal(signal.SIGCONT)

    assert tokens == wanted
    moved = migrations(system) - before
    assert 0 < moved <= STREAMS / 2, "streams of the other ranks stay where they are"
    whole_again(system)
    assert all_streams(system, folder.name, 1, lambda: None) == wanted


def test_a_rank_that_drains_leaves_without_a_stream_moving(
    start: Start, folder: Path, wanted: list[list[int]]
) -> None:
    system = start(folder, *FLAGS)
    whole_again(system)
    victim, before = rank_process(system, 0), migrations(system)

    assert all_streams(system, folder.name, 25, victim.terminate) == wanted

    assert migrations(system) == before
    victim.wait(60)
    whole_again(system)  # the launcher starts it again, and it is taken in
    assert all_streams(system, folder.name, 1, lambda: None) == wanted
