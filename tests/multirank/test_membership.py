"""Ranks are lost in the middle of a step, come, and leave; the others give the bits of one rank."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from decode.lockstep import RankState, Rebalancing, StepPlan, StepRow, decide
from decode.rebalance import ExpertMoves, RebalanceRule
from engine.collectives import ExpertGroup, StepGroup
from engine.experts.placement import EMPTY
from engine.experts.spread import ExpertSpread
from engine.kvcache.storage import KVStorage
from engine.loading import load
from engine.model_runner import ModelRunner
from engine.rendezvous import Rendezvous
from protocol.errors import WorkerLost
from tests.multirank.test_wide import MOST_BLOCKS, _step, on_one_rank, requests_of
from tests.support.ranks import Parent, RankProcess, free_address, run_ranks, start_rank

CPU = torch.device("cpu")
pytestmark = pytest.mark.multirank

Phase = Literal["before the rows", "before dispatch", "before combine", "while experts move"]
Answers = list[tuple[str, list[int], str]]
HITS_AFTER = 6  # steps
ALONE_S = 300.0  # kernels may have to be compiled on busy cores


@dataclass(frozen=True, kw_only=True)
class Fault:
    """The rank does ``how`` to itself."""

    phase: Phase
    how: signal.Signals


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a rank does in a test."""

    seats: int
    first: int  # ranks that begin
    least: int
    num_output: int
    step_timeout_s: float
    fault: Fault | None = None
    moving: bool = False  # experts move; a turn waits for whoever plans or reads here
    leaves: bool = False  # when its requests have ended and all seats have been taken once


@dataclass(frozen=True, kw_only=True)
class Done:
    answers: Answers
    interruptions_s: list[float]  # from noticing that a rank is lost to the next step's end
    moved_short: int  # how often a layer's experts were moved while a seat was empty
    held: int  # experts here, of all layers


class Rank:
    """``decode.loop`` without its clients: the same rows, moves and meetings."""

    def __init__(self, seat: int, address: str, folder: Path, part: Part) -> None:
        self.part, self.seat = part, seat
        self.group = ExpertGroup(seat=seat, num_seats=part.seats, device=CPU)
        spread = ExpertSpread(
            redundant=8,
            least_ranks=part.least,
            ranks_per_tray=1,
            movable=part.moving,
            counted=True,
        )
        loaded = load(
            folder, device=CPU, dtype="float32", numerics="exact", group=self.group, spread=spread
        )
        self.requests = requests_of(seat, part.num_output)
        blocks = max(1, MOST_BLOCKS * len(self.requests))
        self.runner = ModelRunner(loaded.model, KVStorage(loaded.layout, blocks, device=CPU))
        self.experts = ExpertMoves(
            exchanges=loaded.model.slot_exchanges,
            placements={
                layer: placement
                for layer, placement in enumerate(loaded.placements)
                if loaded.config.sparse_layers[layer]
            },
            counts=loaded.counts,
            seat=seat,
            topology=spread.topology(part.seats),
            mode=spread.mode,
            rule=RebalanceRule(window=2, interval=2, above=1.0, moves=part.moving),
        )
        self.rendezvous = Rendezvous(
            self.group,
            address,
            first=part.first,
            least=loaded.least_ranks,
            collective_timeout_s=part.step_timeout_s,
        )
        self.least = loaded.least_ranks
        self.steps = 0
        self.whole = False  # all seats have been taken once
        self.lost_at: float | None = None
        self.interruptions_s: list[float] = []
        self.moved_short = 0

    def live(self, parent: Parent) -> None:
        leaving: tuple[int, ...] = ()
        told = False
        while True:
            step_group = self.rendezvous.form(deadline_s=400, leaving=leaving)
            leaving = ()
            try:
                self.experts.enter_group(step_group.members)
                self.whole |= len(step_group.members) == self.part.seats
                plan = None
                while plan is None or plan.kind != "regroup":
                    if not told and self.over:
                        told = True
                        parent.send(self.done())
                    plan = self.turn(step_group)
                leaving = plan.leaving
            except WorkerLost:
                self.lost_at = time.monotonic()
            finally:
                step_group.close()
            if self.seat in leaving:
                self.rendezvous.close()
                return

    @property
    def over(self) -> bool:
        return all(len(request.text) == request.end for request in self.requests)

    def done(self) -> Done:
        answers = [request.answer for request in self.requests]
        held = [
            expert
            for placement in self.experts.placements.values()
            for expert in placement.slots_of(self.seat)
            if expert != EMPTY
        ]
        return Done(
            answers=answers,
            interruptions_s=self.interruptions_s,
            moved_short=self.moved_short,
            held=len(held),
        )

    def turn(self, step_group: StepGroup) -> StepPlan:
        present = [(n, each) for n, each in enumerate(self.requests) if each.here(self.steps)]
        hit = self.part.fault is not None and self.steps >= HITS_AFTER
        if hit and self.phase == "before the rows":
            self.strike()
        beside = self.experts._staging or self.experts._planning
        assert beside is None or beside.ended.wait(60)
        rebalancing, placement, started_with = self.experts.row()
        if hit and self.phase == "while experts move" and rebalancing is Rebalancing.STAGED:
            self.strike()
        leaves = self.part.leaves and self.whole and self.over
        row = StepRow(
            seat=self.seat,
            epoch=step_group.epoch,
            state=RankState.LEAVING if leaves else RankState.SERVING,
            tokens=sum(len(request.text) - request.done for _, request in present),
            expecting=False,
            free_blocks=0,
            rebalancing=rebalancing,
            placement=placement,
            started_with=started_with,
            newcomers=self.rendezvous.newcomers,
        )
        rows = [StepRow.from_ints(ints) for ints in step_group.exchange(row.to_ints())]
        plan = decide(rows, least_ranks=self.least)
        self.experts.follow(plan.experts, step_group)
        short = len(step_group.members) < self.part.seats
        self.moved_short += short and plan.experts == "commit"
        if plan.kind == "decode":
            self.group.begin_step(plan.tokens_of_rank)
            with self.striking(hit):
                _step(self.runner, present)
            self.experts.after_step()
            self.steps += 1
            if self.lost_at is not None:
                self.interruptions_s.append(time.monotonic() - self.lost_at)
                self.lost_at = None
        elif plan.kind == "restore":
            self.experts.restore(step_group, plan.teller)
        elif plan.kind == "idle":
            self.steps += 1
            time.sleep(plan.pace_s)
        return plan

    @property
    def phase(self) -> Phase:
        assert self.part.fault is not None
        return self.part.fault.phase

    def strike(self) -> None:
        assert self.part.fault is not None
        os.kill(os.getpid(), self.part.fault.how)

    @contextmanager
    def striking(self, hit: bool) -> Iterator[None]:
        """In a middle layer: before this rank sends its tokens, or before it sends results home."""
        if not hit or self.phase not in ("before dispatch", "before combine"):
            yield
            return
        exchange, calls = self.group.exchange_rows, 0
        fatal_call = 3 if self.phase == "before dispatch" else 4

        def struck(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fatal_call:
                self.strike()
            return exchange(*args, **options)

        self.group.exchange_rows = struck  # type: ignore[method-assign]
        try:
            yield
        finally:
            self.group.exchange_rows = exchange  # type: ignore[method-assign]


def take_part(seat: int, address: str, folder: Path, part: Part, parent: Parent) -> None:
    rank = Rank(seat, address, folder, part)
    parent.send("loaded")
    rank.live(parent)
    parent.send("left")


def wanted(folder: Path, seats: int, num_output: int) -> dict[str, tuple[str, list[int], str]]:
    (alone,) = run_ranks(on_one_rank, 1, folder, num_output, seats, timeout_s=ALONE_S)
    return {answer[0]: answer for answer in alone}


def check_answers(
    ranks: dict[int, RankProcess], right: dict[str, tuple[str, list[int], str]], within_s: float
) -> dict[int, Done]:
    """Every rank's requests end with the right bits."""
    found = {}
    for seat, rank in ranks.items():
        done = rank.receive(within_s)
        assert isinstance(done, Done), done
        for name, text, digest in done.answers:
            assert text == right[name][1], f"seat {seat}: other tokens"
            assert digest == right[name][2], f"seat {seat}: the same tokens, but other bits"
        found[seat] = done
    return found


def lose_one(folder: Path, seats: int, fault: Fault, *, within_s: float) -> list[float]:
    victim = seats // 2  # of the ranks that have requests
    victim -= victim % 3
    address, right = free_address(), wanted(folder, seats, 24)
    part = Part(
        seats=seats,
        first=seats,
        least=seats - 1,
        num_output=24,
        step_timeout_s=3,
        moving=fault.phase == "while experts move",
    )
    striking = replace(part, fault=fault)
    ranks = {
        seat: start_rank(take_part, seat, address, folder, striking if seat == victim else part)
        for seat in range(seats)
    }
    try:
        for rank in ranks.values():
            assert rank.receive(within_s) == "loaded"
        lost = ranks.pop(victim)
        done = check_answers(ranks, right, within_s)
        lost.stop()
        # A rank without requests has told at once.
        assert not part.moving or all(rank.moved_short for rank in done.values() if rank.answers)
        return [seconds for rank in done.values() for seconds in rank.interruptions_s]
    finally:
        for rank in ranks.values():
            rank.stop()


PHASES: list[Phase] = ["before the rows", "before dispatch", "before combine", "while experts move"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_killed_in_a_step_changes_no_bit_of_the_others(
    phase: Phase, tiny_checkpoint: Callable[[str], Path]
) -> None:
    fault = Fault(phase=phase, how=signal.SIGKILL)
    interruptions = lose_one(tiny_checkpoint("deepseek_v3_256_experts"), 4, fault, within_s=60)
    assert interruptions, "somebody has noticed"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
@pytest.mark.parametrize("phase", PHASES)
def test_one_of_16_ranks_lost_in_a_step_changes_no_bit_of_the_others(
    phase: Phase, how: signal.Signals, tiny_checkpoint: Callable[[str], Path]
) -> None:
    folder = tiny_checkpoint("deepseek_v3_256_experts")
    interruptions = lose_one(folder, 16, Fault(phase=phase, how=how), within_s=300)
    print(f"{phase}, {how.name}: longest interruption {max(interruptions):.2f} s")
    assert interruptions


def scale(
    folder: Path, start: int, seats: int, end: int, *, within_s: float, moving: bool = False
) -> dict[int, Done]:
    """``start`` ranks begin, the other ``seats`` join, and all beyond ``end`` leave; all work."""
    address, right = free_address(), wanted(folder, seats, 20)
    parts = {
        seat: Part(
            seats=seats,
            first=start,
            least=end,
            num_output=20,
            step_timeout_s=60,
            moving=moving,
            leaves=seat >= end,
        )
        for seat in range(seats)
    }
    ranks: dict[int, RankProcess] = {}
    try:
        for some in (range(start), range(start, seats)):
            new = {s: start_rank(take_part, s, address, folder, parts[s]) for s in some}
            ranks |= new
            for rank in new.values():
                assert rank.receive(within_s) == "loaded"
        done = check_answers(ranks, right, within_s)
        for seat in range(end, seats):
            assert ranks[seat].receive(within_s) == "left"
        return done
    finally:
        for rank in ranks.values():
            rank.stop()


def test_a_group_grows_and_shrinks_under_load(tiny_checkpoint: Callable[[str], Path]) -> None:
    scale(tiny_checkpoint("deepseek_v3_256_experts"), 3, 5, 2, within_s=60)


def test_a_rank_that_joins_while_experts_move_is_told_where_they_are_and_gets_some(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    folder = tiny_checkpoint("deepseek_v3_256_experts")
    done = scale(folder, 3, 5, 2, within_s=60, moving=True)
    busy = {seat: rank for seat, rank in done.items() if rank.answers}
    assert any(rank.moved_short for rank in busy.values())
    assert busy[3].held, "it was told that it has none, and got some"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_group_of_64_grows_to_72_and_shrinks_to_48(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    scale(tiny_checkpoint("deepseek_v3_256_experts"), 64, 72, 48, within_s=1200)
