"""Replacing workers one by one while streams run, as an operator does it: ``headrace drain``."""

import re
import subprocess
import sys
import threading

import pytest

from benchmarks.local_system import LocalSystem
from tests.e2e.conftest import Start
from tests.e2e.test_faults import eventually, ready, stream_lines, text_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
FLAGS = (
    *("--prefill", "2", "--decode-ranks", "2", "--kv-cache", "128MiB", "--dtype", "float32"),
    *("--set", "gateway.migration_patience_s=0"),  # a stream that loses its workers ends at once
)
DEADLINE_S = 120.0


@pytest.fixture
def system(start: Start) -> LocalSystem:
    started = start("smollm2", *FLAGS)
    eventually(lambda: ready(started), "ready")
    return started


def drained(system: LocalSystem, worker: str) -> subprocess.CompletedProcess[str]:
    told = re.search(r"--scheduler (\S+)", system.output())
    assert told is not None
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", "drain", worker, "--scheduler", told[1]],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )


def pids(system: LocalSystem, role: str) -> set[int]:
    return {process.pid for process in system.processes(role)}


def drained_during_a_stream(system: LocalSystem, worker: str) -> list[str]:
    """The stream's lines; the worker has left, without a failure, before this returns."""
    ended: list[subprocess.CompletedProcess[str]] = []
    draining = threading.Thread(target=lambda: ended.append(drained(system, worker)))

    def begin(count: int) -> None:
        if count == 3:
            draining.start()

    lines = stream_lines(system, begin)
    draining.join(DEADLINE_S)
    assert [done.returncode for done in ended] == [0], ended
    assert f"{worker} has left after" in ended[0].stderr
    return lines


@pytest.mark.parametrize(
    ("role", "workers"), [("prefill", ["prefill-0", "prefill-1"]), ("decode", ["decode-0"])]
)
def test_workers_are_replaced_one_by_one_and_no_stream_breaks(
    system: LocalSystem, role: str, workers: list[str]
) -> None:
    undisturbed = text_of(stream_lines(system, lambda _: None))
    before, count = pids(system, role), len(pids(system, role))
    for worker in workers:
        lines = drained_during_a_stream(system, worker)
        assert lines[-1] == "[DONE]"
        assert text_of(lines) == undisturbed
        eventually(lambda: len(pids(system, role)) == count and ready(system), "ready again")
    assert pids(system, role) & before == set()
    assert text_of(stream_lines(system, lambda _: None)) == undisturbed


def test_a_worker_that_is_not_there_is_said_with_those_that_are(system: LocalSystem) -> None:
    done = drained(system, "prefill-7")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    for known in ("no worker prefill-7", "prefill-0", "prefill-1", "decode-0"):
        assert known in done.stderr


def test_without_a_scheduler_the_command_says_how_to_name_one() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "drain", "x", "--scheduler", "tcp://127.0.0.1:9"],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 1
    assert "no scheduler answers at tcp://127.0.0.1:9: name it with --scheduler" in done.stderr
