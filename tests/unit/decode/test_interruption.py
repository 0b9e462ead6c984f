"""A rank says how long it stood still between two groups, why, and without whom it goes on."""

import json
import logging
from collections.abc import Sequence

import pytest
import torch

from decode.interruption import Interruption
from engine.backends import alone
from engine.collectives import ExpertGroup, StepGroup
from engine.experts.meter import ExchangeMeter
from protocol.errors import WorkerLost
from runtime.log import JsonFormatter

CPU = torch.device("cpu")
LOST = WorkerLost("a rank was lost: rank 6 has left")


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def group_of(epoch: int, members: Sequence[int]) -> StepGroup:
    experts = ExpertGroup(seat=0, num_seats=4, device=CPU)
    return StepGroup(experts, epoch=epoch, members=members, connection=alone())


class Rank:
    def __init__(self) -> None:
        self.time = Time()
        self.meter = ExchangeMeter(CPU)
        self.interruption = Interruption(self.meter, clock=self.time)
        self.interruption.met(group_of(1, range(4)))
        self.interruption.passed(group_of(1, range(4)), "decode")

    @property
    def stood_still_s(self) -> float:
        return self.meter.traffic().interrupted_s


def lines(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, object]]:
    found = [json.loads(JsonFormatter("decode-0/0").format(record)) for record in caplog.records]
    return [line for line in found if line["event"] == event]


def test_a_first_meeting_interrupts_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert Rank().stood_still_s == 0
    assert not lines(caplog, "decoding goes on")


def test_an_interruption_lasts_until_a_turn_has_passed(caplog: pytest.LogCaptureFixture) -> None:
    rank, next_group = Rank(), group_of(2, (0, 1, 3))
    with caplog.at_level(logging.INFO):
        rank.time.now += 3
        rank.interruption.broken(group_of(1, range(4)), LOST)
        rank.time.now += 1
        rank.interruption.met(next_group)
        rank.time.now += 0.25
        rank.interruption.passed(next_group, "restore")
        assert not lines(caplog, "decoding goes on")
        rank.interruption.passed(next_group, "decode")
        rank.interruption.passed(next_group, "decode")

    (line,) = lines(caplog, "decoding goes on")
    assert line["stood_still_s"] == 4.25
    assert (line["noticing_s"], line["meeting_s"]) == (3, 1)
    assert (line["meetings"], line["without"], line["newly_with"]) == (1, [2], [])
    assert line["reason"] == str(LOST)
    assert rank.stood_still_s == 4.25


def test_groups_that_break_before_a_turn_are_one_interruption(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rank = Rank()
    with caplog.at_level(logging.INFO):
        rank.interruption.parted(group_of(1, (0, 1, 2)))
        rank.time.now += 1
        rank.interruption.met(group_of(2, range(4)))
        rank.interruption.broken(group_of(2, range(4)), LOST)
        rank.time.now += 1
        rank.interruption.met(group_of(3, (0, 1, 3)))
        rank.interruption.passed(group_of(3, (0, 1, 3)), "idle")

    (line,) = lines(caplog, "decoding goes on")
    assert (line["stood_still_s"], line["meetings"]) == (2, 2)
    assert (line["without"], line["newly_with"]) == ([2], [3])
    assert line["reason"] == "ranks come or leave"
