"""HTTP in, prefill, transfer, decode on 72 ranks, HTTP out: the tokens are those of transformers.

Ranks run their own main, in processes that are forked from one that has imported torch: 72 imports
would take minutes and gigabytes. All else is started as users start it.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoModelForCausalLM

from benchmarks.local_system import free_port
from decode.settings import DecodeSettings
from tests.e2e.test_greedy_tokens import a_prompt, completion, greedy, token_ids
from tests.support.ranks import Parent, RankProcess, free_address, start_rank

START_S = 400.0
STREAMS = 24  # some ranks have one, others none
TOKENS = 12


def live(seat: int, options: dict[str, Any], parent: Parent) -> None:
    from decode.worker import run

    parent.send(run(DecodeSettings.model_validate(options)))


def options_of(seat: int, ranks: int, folder: Path, address: str, scheduler: str) -> dict[str, Any]:
    return {
        "model": {"path": str(folder), "name": folder.name, "dtype": "float32"},
        "kv_cache_bytes": 2**20,
        "bus": {"scheduler": scheduler},
        "process": {"threads": 1, "log_level": "warning"},
        "group": {
            "rank": seat,
            "ranks": ranks,
            "rendezvous": address,
            "rendezvous_timeout_s": START_S,
            "step_timeout_s": 120,  # so many share so few cores
        },
        "experts": {"redundant": 32, "ranks_per_tray": 4},
    }


@contextmanager
def wide_system(folder: Path, ranks: int) -> Iterator[tuple[str, list[RankProcess]]]:
    """Its address, when it is ready, and its ranks."""
    port, scheduler = free_port(), f"tcp://{free_address()}"
    common = (str(folder), "--scheduler", scheduler, "--log-level", "warning")
    computing = ("--dtype", "float32", "--kv-cache", "16MiB", "--threads", "1")
    with ExitStack() as running:
        for role, flags in (("gateway", ("--port", str(port))), ("prefill", computing)):
            running.enter_context(_role(role, *common, *flags))
        address = free_address()
        started = [
            start_rank(live, seat, options_of(seat, ranks, folder, address, scheduler))
            for seat in range(ranks)
        ]
        for rank in started:
            running.callback(rank.stop)
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, started)
        yield url, started


@contextmanager
def _role(*arguments: str) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-m", "deploy.cli", *arguments])
    try:
        yield
    finally:
        process.kill()
        process.wait(10)


def _wait_until_ready(url: str, ranks: Sequence[RankProcess]) -> None:
    deadline = time.monotonic() + START_S
    answer = "nothing"
    while time.monotonic() < deadline:
        for rank in ranks:
            assert not rank.pipe.poll(), rank.receive()
        with suppress(httpx.HTTPError):
            ready = httpx.get(f"{url}/ready", timeout=30)
            if ready.status_code == httpx.codes.OK:
                return
            answer = ready.text
        time.sleep(0.2)
    raise TimeoutError(f"not ready after {START_S} s: /ready says {answer}")


def check(folder: Path, ranks: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    prompts = [a_prompt(3 + 5 * seed % 40, 300, seed) for seed in range(STREAMS)]
    wanted = [greedy(model, prompt, TOKENS) for prompt in prompts]
    del model
    with wide_system(folder, ranks) as (url, _), ThreadPoolExecutor(STREAMS) as threads:
        began = time.monotonic()
        answers = list(
            threads.map(
                lambda prompt: completion(url, folder.name, prompt, max_tokens=TOKENS), prompts
            )
        )
        seconds = time.monotonic() - began
        (group,) = httpx.get(f"{url}/status", timeout=30).json()["groups"]
    assert [token_ids(answer) for answer in answers] == wanted
    assert group["present"] == ranks
    print(f"{STREAMS} streams of {TOKENS} tokens on {ranks} ranks: {seconds:.1f} s")


@pytest.mark.timeout(300)
def test_a_system_of_eight_ranks_gives_the_tokens_of_transformers(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    check(tiny_checkpoint("deepseek_v3_256_experts"), 8)


@pytest.mark.slow
@pytest.mark.timeout(880)
def test_a_system_of_72_ranks_gives_the_tokens_of_transformers(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    check(tiny_checkpoint("deepseek_v3_256_experts"), 72)
