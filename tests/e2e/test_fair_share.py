"""Two callers of a system that has no room for both: what one sends does not shut out the other."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from benchmarks.local_system import LocalSystem
from tests.e2e.conftest import Start
from tests.e2e.test_faults import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
FLAGS = ("--decode-ranks", "2", "--kv-cache", "24MiB", "--dtype", "float32")
FEW_WAIT = ("--set", "gateway.max_waiting_requests=8")
FLOOD = 48
KEYS = """\
flood-key name=flood
quiet-key name=quiet
"""


@pytest.fixture
def system(start: Start, tmp_path: Path) -> LocalSystem:
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    return start("smollm2", *FLAGS, *FEW_WAIT, "--api-keys-file", str(keys))


def ask(system: LocalSystem, caller: str, max_tokens: int) -> httpx.Response:
    body = {"model": "smollm2", "prompt": "Once", "max_tokens": max_tokens, "ignore_eos": True}
    headers = {"authorization": f"Bearer {caller}-key"}
    return httpx.post(f"{system.url}/v1/completions", json=body, headers=headers, timeout=200)


def test_a_flood_of_one_key_fills_the_line_and_another_key_is_served(system: LocalSystem) -> None:
    with ThreadPoolExecutor(FLOOD) as pool:
        flood = [pool.submit(ask, system, "flood", 100) for _ in range(FLOOD)]
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
    assert len(served) + len(refused) == FLOOD
    assert all(answer.json()["usage"]["completion_tokens"] == 100 for answer in served)
