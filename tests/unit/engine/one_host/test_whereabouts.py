"""Who can share memory with whom, and whose process has ended."""

import os
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest

from engine.one_host.whereabouts import Mourner, Whereabouts, here, is_known

TELL = (
    "import sys, msgspec; from engine.one_host.whereabouts import here;"
    "print(msgspec.json.encode(here()).decode(), flush=True); sys.stdin.read()"
)


@pytest.fixture
def other() -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", TELL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.kill()
    process.communicate()


def whereabouts_of(process: "subprocess.Popen[str]") -> Whereabouts:
    assert process.stdout is not None
    return msgspec.json.decode(process.stdout.readline(), type=Whereabouts)


def test_two_processes_of_one_user_are_on_one_host(other: "subprocess.Popen[str]") -> None:
    theirs = whereabouts_of(other)
    assert theirs.host == here().host
    assert theirs.pid == other.pid
    assert is_known(theirs)


def test_a_death_is_noticed_once(other: "subprocess.Popen[str]") -> None:
    theirs = whereabouts_of(other)
    mourner = Mourner({4: theirs})
    assert mourner.ended() == []
    other.kill()
    other.communicate()
    assert mourner.ended() == [4]
    assert mourner.ended() == []
    mourner.close()


def test_another_process_of_the_same_number_is_not_taken_for_it() -> None:
    before = msgspec.structs.replace(here(), started=here().started - 1)
    with pytest.raises(ProcessLookupError, match=f"process {os.getpid()} has ended"):
        Mourner({2: before})


def test_a_process_that_has_ended_is_not_watched(other: "subprocess.Popen[str]") -> None:
    theirs = whereabouts_of(other)
    other.kill()
    other.communicate()
    with pytest.raises(OSError, match=r".*"):
        Mourner({1: theirs})


def test_watching_leaves_no_descriptor_behind() -> None:
    before = len(os.listdir("/proc/self/fd"))
    Mourner({0: here()}).close()
    assert len(os.listdir("/proc/self/fd")) == before
