"""The check of two hosts, and that its knocks notice a door that is open."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from tests.containers import two_hosts

SCRIPT = Path(two_hosts.__file__)


def namespaces_can_be_made() -> bool:
    if os.geteuid() != 0:
        return False
    try:
        two_hosts._ip("netns", "add", "hr-try")
    except (SystemExit, OSError):
        return False
    subprocess.run(["ip", "netns", "del", "hr-try"], check=True)
    return True


@pytest.fixture
def open_bus() -> Iterator[int]:
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.linger = 0
    yield socket.bind_to_random_port("tcp://127.0.0.1")
    socket.close()
    context.term()


def test_a_bus_without_a_key_is_noticed(open_bus: int, capsys: pytest.CaptureFixture[str]) -> None:
    two_hosts.knock("127.0.0.1", open_bus)
    assert capsys.readouterr().out.startswith("OPEN")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not namespaces_can_be_made(), reason="needs root and network namespaces")
def test_a_system_on_two_hosts_serves_and_lets_in_nobody_without_a_key() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT], capture_output=True, text=True, check=False, timeout=350
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"faults": []' in done.stdout
