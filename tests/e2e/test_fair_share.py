"""Two callers of a system that has no room for both: what one sends does not shut out the other."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest

from benchmarks.local_system import LocalSystem
from tests.e2e.conftest import Start
from tests.e2e.test_faults import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
FLAGS = ("--kv-cache", "24MiB", "--dtype", "float32")
FEW_WAIT = ("--decode-ranks", "2", "--set", "gateway.max_waiting_requests=8")
ONE_RANK = ("--decode-ranks", "1")
KEYS = """\
flood-key name=flood
quiet-key name=quiet
"""

StartWithKeys = Callable[..., LocalSystem]


@pytest.fixture
def start_with_keys(start: Start, tmp_path: Path) -> StartWithKeys:
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    return partial(start, "smollm2", *FLAGS, "--api-keys-file", str(keys))


def ask(
    system: LocalSystem, caller: str, max_tokens: int, *, prompt: str = "Once"
) -> httpx.Response:
    body = {"model": "smollm2", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
    headers = {"authorization": f"Bearer {caller}-key"}
    return httpx.post(f"{system.url}/v1/completions", json=body, headers=headers, timeout=250)


def test_a_flood_of_one_key_fills_the_line_and_another_key_is_served(
    start_with_keys: StartWithKeys,
) -> None:
    system, requests = start_with_keys(*FEW_WAIT), 48
    with ThreadPoolExecutor(requests) as pool:
        flood = [pool.submit(ask, system, "flood", 100) for _ in range(requests)]
        eventually(lambda: any(one.done() for one in flood), "a request that was turned away")
        assert {one.result().status_code for one in flood if one.done()} == {503}
        quiet = ask(system, "quiet", 4)
        assert quiet.status_code == 200, quiet.text
        assert not all(one.done() for one in flood)
        answers = [one.result() for one in flood]
    refused = [answer for answer in answers if answer.status_code == 503]
    assert refused
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
    served = [answer for answer in answers if answer.status_code == 200]
    assert len(served) + len(refused) == requests
    assert all(answer.json()["usage"]["completion_tokens"] == 100 for answer in served)


def test_a_flood_that_fills_a_rank_does_not_hold_up_another_key_there(
    start_with_keys: StartWithKeys,
) -> None:
    system, requests = start_with_keys(*ONE_RANK), 20
    with ThreadPoolExecutor(requests) as pool:
        flood = [pool.submit(ask, system, "flood", 200) for _ in range(requests)]
        eventually(lambda: any(one.done() for one in flood), "an answer", within_s=200)
        quiet = [ask(system, "quiet", 4) for _ in range(5)]
        unfinished = sum(not one.done() for one in flood)
        answers = [one.result() for one in flood]
    assert [answer.status_code for answer in quiet] == [200] * len(quiet)
    assert unfinished > requests // 2, (
        f"{unfinished} of the flood were left when the others were done"
    )
    assert [answer.status_code for answer in answers] == [200] * requests
    assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {200}


def test_a_flood_of_long_prompts_does_not_hold_up_another_key_at_prefill(
    start_with_keys: StartWithKeys,
) -> None:
    system, requests = start_with_keys("--kv-cache", "1GiB", *ONE_RANK), 16
    prompts = [f"{number} " + "sheep on the hill, " * 300 for number in range(requests)]
    with ThreadPoolExecutor(requests) as pool:
        flood = [pool.submit(ask, system, "flood", 1, prompt=prompt) for prompt in prompts]
        eventually(lambda: any(one.done() for one in flood), "an answer", within_s=100)
        quiet = [ask(system, "quiet", 1, prompt=f"{n} " + "dogs " * 100) for n in range(3)]
        unfinished = sum(not one.done() for one in flood)
        answers = [one.result() for one in flood]
    assert [answer.status_code for answer in quiet] == [200] * len(quiet)
    assert unfinished > requests // 2, f"{unfinished} of the flood were left"
    assert [answer.status_code for answer in answers] == [200] * requests
