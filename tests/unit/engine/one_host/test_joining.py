"""Ranks come to the same end: all share memory, or none does, and all know why."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import msgspec
import pytest
from torch._C._distributed_c10d import HashStore

from engine.backends import terms_of
from engine.one_host.joining import join
from engine.one_host.segment import Life
from engine.one_host.shared_rows import SharedRows
from engine.one_host.whereabouts import Whereabouts, here

SEATS = (0, 2, 3)  # seat 1 is empty: people are told seats, not places among those that are taken


def joined(places: Sequence[Whereabouts], *, timeout_s: float = 1.0) -> list[SharedRows | str]:
    """What ranks at these places come to; all are threads of this process."""
    store = HashStore()
    store.set_timeout(timedelta(seconds=10))
    life = Life(epoch=1, number=9, size=len(places))
    with ThreadPoolExecutor(len(places)) as threads:
        return list(
            threads.map(
                lambda rank: join(
                    store,
                    life,
                    rank=rank,
                    seats=SEATS[: len(places)],
                    where=places[rank],
                    timeout_s=timeout_s,
                ),
                range(len(places)),
            )
        )


def test_ranks_of_one_host_share_memory() -> None:
    for rows in joined([here()] * 3):
        assert isinstance(rows, SharedRows)
        rows.abort()


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("another boot/1/2/0", "rank 2 is on another host than rank 0"),
        ("unknown: no /proc", "rank 2 cannot share memory: unknown: no /proc"),
    ],
)
def test_ranks_that_are_apart_share_none_and_all_know_why(host: str, why: str) -> None:
    found = joined([here(), msgspec.structs.replace(here(), host=host), here()])
    assert [str(told).startswith(why) for told in found] == [True] * 3


def test_where_one_cannot_be_watched_none_share_memory() -> None:
    gone = msgspec.structs.replace(here(), started=here().started - 1)
    before = len(os.listdir("/proc/self/fd"))
    found = joined([here(), gone, here()])
    assert all(isinstance(told, str) and f"process {gone.pid} has ended" in told for told in found)
    assert len(os.listdir("/proc/self/fd")) == before


def test_where_there_is_no_memory_all_know_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int, __: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "ftruncate", full)
    found = joined([here()] * 2)
    assert found == ["rank 0 cannot share memory: no memory to share: no space left"] * 2


def test_ranks_that_must_share_memory_only_meet_on_one_host() -> None:
    assert terms_of("decode", "shared_memory") == {
        "decode.group.rows": f"shared_memory on {here().host}"
    }
    assert terms_of("decode", "auto") != terms_of("decode", "gloo")
