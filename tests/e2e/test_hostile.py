"""What nobody should send, and clients that leave, against a whole system of real processes."""

import json
import random
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from benchmarks.local_system import LocalSystem
from tests.e2e.conftest import Start
from tests.e2e.test_clients import held_blocks
from tests.e2e.test_faults import FLAGS, attempts_in_flight, eventually
from tests.support.checkpoints import make_checkpoint
from tests.support.mutations import VALID, check, mutated

pytestmark = [pytest.mark.slow, pytest.mark.timeout(850)]
ROLES = ("gateway", "prefill", "decode")
AT_ONCE = 16
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def system(start: Start, checkpoint: Path) -> LocalSystem:
    return start(checkpoint, *FLAGS, "--name", "tiny")


def pids(system: LocalSystem) -> set[int]:
    return {process.pid for role in ROLES for process in system.processes(role)}


def files(system: LocalSystem) -> dict[int, int]:
    """How many files each of the processes has open."""
    return {p.pid: p.num_fds() for role in ROLES for p in system.processes(role)}


def test_ten_thousand_mutations_are_answered_and_no_worker_ends(system: LocalSystem) -> None:
    chance = random.Random(3)
    sent = [(path, mutated(body, chance)) for path, body in chance.choices(VALID, k=10_000)]
    before = pids(system)
    headers = {"content-type": "application/json", "x-request-timeout": "20"}

    def send(request: tuple[str, bytes]) -> int:
        path, body = request
        answer = client.post(path, content=body, headers=headers)
        check(path, body, answer, also=(504,))
        return answer.status_code

    with httpx.Client(base_url=system.url, timeout=60) as client:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            statuses = list(pool.map(send, sent))
        assert statuses.count(504) < 100
        assert 1000 < statuses.count(200) < 8000
        assert pids(system) == before
        for path, body in VALID:
            assert client.post(path, json=body).status_code == 200
    eventually(lambda: held_blocks(system) == attempts_in_flight(system) == 0, "nothing is held")


def hang_up(address: tuple[str, int], chance: random.Random) -> None:
    """Send a request, or only the beginning of one, read for a while and go."""
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x " * chance.randrange(1, 100)}],
        "max_tokens": 100,
        "ignore_eos": True,
        "stream": chance.random() < 0.8,
        "n": chance.choice((1, 1, 1, 3)),
    }
    content = json.dumps(body).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    request = head + b"content-length: %d\r\n\r\n" % len(content) + content
    if chance.random() < 0.2:
        request = request[: chance.randrange(len(request))]
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(request)
        connection.settimeout(0.01 + chance.random() * 0.6)
        try:
            while chance.random() < 0.9 and connection.recv(65536):
                pass
        except TimeoutError:
            pass
        if chance.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def test_two_thousand_clients_that_hang_up_leave_nothing_behind(system: LocalSystem) -> None:
    url = httpx.URL(system.url)
    address = (url.host, url.port or 0)
    clients = [random.Random(number) for number in range(2000)]
    with ThreadPoolExecutor(AT_ONCE) as pool:  # what is opened once is open from now on
        list(pool.map(lambda chance: hang_up(address, chance), clients[:50]))
    eventually(lambda: held_blocks(system) == attempts_in_flight(system) == 0, "nothing is held")
    before = files(system)
    with ThreadPoolExecutor(100) as pool:
        list(pool.map(lambda chance: hang_up(address, chance), clients))
    eventually(
        lambda: (
            held_blocks(system) == attempts_in_flight(system) == 0
            and all(count <= before[pid] for pid, count in files(system).items())
        ),
        "everything is free again",
    )
    assert set(files(system)) == set(before)
