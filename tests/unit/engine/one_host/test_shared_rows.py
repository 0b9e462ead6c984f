"""What a rank that waits for others says of it."""

import logging
import threading
import time

import pytest
import torch
from torch._C._distributed_c10d import AllgatherOptions

from engine.one_host import shared_rows
from engine.one_host.shared_rows import SharedRows
from engine.one_host.whereabouts import here
from tests.unit.engine.one_host.test_joining import SEATS, joined

LATE = "other ranks keep this one waiting"
HEARD_S = 20.0


def gathered(rows: SharedRows) -> None:
    rows._allgather_base(torch.zeros(3, 1), torch.zeros(1, 1), AllgatherOptions()).wait()


def test_a_long_wait_is_told_with_those_who_are_late(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_rows, "LONG_S", 0.0)
    found = joined([here()] * 3, timeout_s=HEARD_S)
    ranks = [rank for rank in found if isinstance(rank, SharedRows)]
    with caplog.at_level(logging.INFO):
        waiting = [threading.Thread(target=gathered, args=(rank,)) for rank in ranks[:2]]
        for thread in waiting:
            thread.start()
        deadline = time.monotonic() + HEARD_S
        while caplog.text.count(LATE) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        gathered(ranks[2])
        for thread in waiting:
            thread.join(HEARD_S)
    late = [record.__dict__["fields"] for record in caplog.records if record.message == LATE]
    assert [fields["ranks"][-1] for fields in late] == [SEATS[2]] * 2
    assert caplog.text.count("have come") == 2
    for rank in ranks:
        rank.abort()
