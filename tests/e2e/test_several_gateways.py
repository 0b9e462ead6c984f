"""Several gateways on one port, and the scheduler that they share."""

import re
from functools import partial

import httpx
import psutil
import pytest

from benchmarks.local_system import LocalSystem
from tests.e2e.conftest import Start
from tests.e2e.test_faults import FLAGS, eventually

pytestmark = pytest.mark.timeout(300)
BODY = {"model": "smollm2", "prompt": "The sea", "max_tokens": 2, "temperature": 0}
LISTENING = re.compile(r"(gateway-\d) +listening on (http://\S+)")
ANSWERED = 'headrace_http_requests_total{endpoint="completions",outcome="ok"}'


@pytest.fixture
def system(start: Start) -> LocalSystem:
    return start("smollm2", *FLAGS, "--gateways", "2")


def complete(url: str) -> str:
    """On a connection of its own, so that the kernel chooses a gateway anew."""
    answer = httpx.post(f"{url}/v1/completions", json=BODY, timeout=60)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def own_urls(system: LocalSystem) -> dict[str, str]:
    """The address of each gateway that no other answers, by name; the latest life's."""
    said = LISTENING.findall(system.output())
    return {name: url for name, url in said if url != system.url}


def answered(url: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(ANSWERED))


def gateways(system: LocalSystem) -> list[psutil.Process]:
    return [p for p in system.processes("deploy.cli") if "gateway" in p.cmdline()]


def test_gateways_share_the_work_and_each_tells_its_own_part(system: LocalSystem) -> None:
    urls = own_urls(system)
    assert sorted(urls) == ["gateway-0", "gateway-1"]
    for url in urls.values():
        eventually(partial(serves, url), "it is ready")
    before = {name: answered(url) for name, url in urls.items()}
    texts = {complete(system.url) for _ in range(24)}
    assert len(texts) == 1  # whichever answers, the same workers do
    by_gateway = [answered(url) - before[name] for name, url in urls.items()]
    assert sum(by_gateway) == 24
    assert min(by_gateway) > 0  # 24 connections to one of two: once in 8 million


def test_a_gateway_that_is_killed_leaves_the_port_to_the_other(system: LocalSystem) -> None:
    expected = complete(system.url)
    first, second = gateways(system)
    first.kill()
    first.wait(10)
    assert all(complete(system.url) == expected for _ in range(8))
    assert second.is_running()
    eventually(
        lambda: len(gateways(system)) == 2 and len(own_urls(system)) == 2, "it is started again"
    )
    for url in own_urls(system).values():
        eventually(partial(serves, url), "both serve again")
        assert complete(url) == expected


def serves(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False
