"""Two callers of one decode rank that is too small for what one of them asks: the other gets its
part of the rank, though requests of the first are swapped out there.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from benchmarks.local_system import LocalSystem
from tests.e2e.conftest import Start
from tests.e2e.test_faults import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
FLAGS = ("--decode-ranks", "1", "--kv-cache", "24MiB", "--dtype", "float32")
FLOOD = 20
LONG, SHORT = 200, 4  # tokens; two long ones fit side by side
KEYS = """\
flood-key name=flood
quiet-key name=quiet
"""


@pytest.fixture
def system(start: Start, tmp_path: Path) -> LocalSystem:
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    return start("smollm2", *FLAGS, "--api-keys-file", str(keys))


def ask(system: LocalSystem, caller: str, max_tokens: int) -> httpx.Response:
    body = {"model": "smollm2", "prompt": "Once", "max_tokens": max_tokens, "ignore_eos": True}
    headers = {"authorization": f"Bearer {caller}-key"}
    return httpx.post(f"{system.url}/v1/completions", json=body, headers=headers, timeout=250)


def test_a_flood_that_fills_a_rank_does_not_hold_up_another_key_there(system: LocalSystem) -> None:
    with ThreadPoolExecutor(FLOOD) as pool:
        flood = [pool.submit(ask, system, "flood", LONG) for _ in range(FLOOD)]
        eventually(lambda: any(one.done() for one in flood), "an answer", within_s=200)
        quiet = [ask(system, "quiet", SHORT) for _ in range(5)]
        unfinished = sum(not one.done() for one in flood)
        answers = [one.result() for one in flood]
    assert [answer.status_code for answer in quiet] == [200] * len(quiet)
    assert unfinished > FLOOD // 2, f"{unfinished} of the flood were left when the others were done"
    assert [answer.status_code for answer in answers] == [200] * FLOOD
    assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {LONG}
