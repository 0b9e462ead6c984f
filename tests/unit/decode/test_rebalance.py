"""One rank's part in moving experts: when it counts, plans, stages, commits and gives up."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from decode.lockstep import Rebalancing
from decode.rebalance import ExpertMoves, RebalanceRule, _line_of
from engine.collectives import ExpertGroup, PendingLines
from engine.experts.counting import ExpertCounts
from engine.experts.exchange import ExchangeChoice
from engine.experts.grouped_gemm import ExpertWeights
from engine.experts.layer import ExpertLayer
from engine.experts.placement import (
    EMPTY,
    WHOLE,
    ExpertPlacement,
    Topology,
    place_evenly,
    with_slots,
)
from engine.experts.slot_exchange import SlotExchange
from protocol.errors import ConfigError

CPU = torch.device("cpu")
LAYERS = (1, 2)
EVEN = place_evenly(4, 2, 2)
THREE = with_slots(place_evenly(4, 3, 2), 3)
HOT = torch.tensor([[3, 3, 3, 3, 3, 3, 3, 2, 1, 0]]).T  # most tokens choose expert 3


@dataclass
class TwoAlike:
    """A group of two ranks that say the same, unless ``other`` is what the second one says."""

    rank = 0
    told: list[Sequence[int]] = field(default_factory=list)
    other: Sequence[int] | None = None

    def begin_gather(self, line: Sequence[int], *, root: int) -> PendingLines:
        self.told.append(line)
        return PendingLines(lines=self._lines(line)[: 2 if root == 0 else 0], work=Arrived())

    def begin_broadcast(self, line: Sequence[int], *, root: int) -> PendingLines:
        self.told.append(line)
        return PendingLines(lines=self._lines(line)[root : root + 1], work=Arrived())

    def _lines(self, line: Sequence[int]) -> Tensor:
        other, self.other = self.other or line, None
        return torch.tensor([line, other])


class Arrived:
    def wait(self) -> bool:
        return True


@dataclass
class Rank:
    rule: RebalanceRule
    moving: bool = True
    broken: bool = False
    even: ExpertPlacement = EVEN

    def __post_init__(self) -> None:
        self.group = TwoAlike()
        self.counts = ExpertCounts(LAYERS, 4, device=CPU)
        self.go = threading.Event()
        self.go.set()
        self.exchanges = {layer: self._exchange() for layer in LAYERS} if self.moving else {}
        self.moves = ExpertMoves(
            exchanges=self.exchanges,
            placements=dict.fromkeys(LAYERS, self.even),
            counts=self.counts,
            seat=0,
            topology=Topology(self.even.num_ranks),
            mode="global",
            rule=self.rule,
        )
        self.moves.enter_group(range(self.even.num_ranks))

    def _exchange(self) -> SlotExchange:
        weights = ExpertWeights(gate_up=torch.zeros(3, 4, 2), down=torch.zeros(3, 2, 2))
        group = ExpertGroup(seat=0, num_seats=self.even.num_ranks, device=CPU)
        layer = ExpertLayer(weights, self.even, group, "exact", movable=True)
        return SlotExchange(layer, self.even, seat=0, read=self._read)

    def _read(self, expert: int) -> tuple[Tensor, Tensor]:
        self.go.wait(10)
        if self.broken:
            raise ConfigError("the checkpoint is gone")
        return torch.full((4, 2), float(expert)), torch.full((2, 2), float(expert))

    def steps(self, number: int) -> None:
        for _ in range(number):
            for layer in LAYERS:
                self.counts.add(layer, HOT)
            self.moves.after_step()

    def stage(self) -> Rebalancing:
        return self.moves.row()[0]

    def follow(self, plan: str) -> None:
        """And one turn more, in which it is heard what others said."""
        for each in (plan, "keep"):
            self.moves.follow(each, self.group)  # type: ignore[arg-type]

    def ended(self) -> Rebalancing:
        """The stage after what is done beside the steps."""
        beside = self.moves._staging or self.moves._planning
        assert beside is not None
        assert beside.ended.wait(10)
        return self.stage()


def rule(window: int, interval: int, above: float = 1.0) -> RebalanceRule:
    return RebalanceRule(window=window, interval=interval, above=above)


def test_only_the_steps_of_the_window_are_counted() -> None:
    rank = Rank(rule(2, 5))
    rank.steps(4)
    assert rank.stage() is Rebalancing.COUNTING
    rank.steps(1)
    assert rank.stage() is Rebalancing.READY
    rank.follow("gather")
    assert rank.group.told == [(2, 2, 2, 14)]
    assert rank.moves.report is not None
    assert rank.moves.report.window_tokens == ((2, 2, 2, 14),) * 2
    assert rank.moves.report.tokens == ((5, 5, 5, 35),) * 2


def test_layers_move_one_after_another_until_the_next_window() -> None:
    rank = Rank(rule(3, 3))
    rank.steps(3)
    for layer in LAYERS:
        rank.go.clear()
        rank.follow("gather")
        if layer == LAYERS[0]:
            assert rank.ended() is Rebalancing.PLANNED
        else:
            assert rank.stage() is Rebalancing.PLANNING  # the other rank does it
            half = WHOLE // 2
            rank.group.other = (3, 1, 0, 2, 3, 0, half, WHOLE, half, WHOLE, half, half)
        rank.follow("share")
        assert rank.stage() is Rebalancing.STAGING
        rank.go.set()
        assert rank.ended() is Rebalancing.STAGED
        before = rank.moves.row()[1]
        rank.follow("commit")
        exchange = rank.exchanges[layer]
        assert len(exchange.placement.replicas_of(3)) == 2
        held = exchange.placement.slots_of(0)
        changed = [slot for slot in range(3) if held[slot] != EVEN.slots_of(0)[slot]]
        assert changed
        assert all((exchange.weights.down[slot] == held[slot]).all() for slot in changed)
        assert rank.moves.row()[1] != before
    assert rank.stage() is Rebalancing.COUNTING
    report = rank.moves.report
    assert report is not None
    assert report.placement_epoch == 2
    assert report.held == tuple(rank.exchanges[layer].placement.slots_of(0) for layer in LAYERS)
    rank.steps(1)  # the window begins after it
    rank.steps(3)
    assert rank.stage() is Rebalancing.READY


def test_a_layer_that_is_even_enough_stays() -> None:
    rank = Rank(rule(1, 1, above=10.0))
    rank.steps(1)
    rank.follow("gather")
    assert rank.ended() is Rebalancing.PLANNED
    rank.follow("share")
    assert rank.stage() is Rebalancing.READY  # for the second layer
    rank.follow("gather")
    rank.follow("share")  # the other rank says what we have
    assert rank.stage() is Rebalancing.COUNTING
    assert all(exchange.placement == EVEN for exchange in rank.exchanges.values())


def test_an_expert_that_cannot_be_read_is_told_and_the_round_given_up() -> None:
    rank = Rank(rule(1, 1), broken=True)
    rank.steps(1)
    rank.follow("gather")
    rank.ended()
    rank.follow("share")
    assert rank.ended() is Rebalancing.FAILED
    rank.follow("abandon")
    assert rank.stage() is Rebalancing.COUNTING
    assert all(exchange.placement == EVEN for exchange in rank.exchanges.values())


def test_what_was_under_way_is_dropped_when_the_ranks_meet_anew() -> None:
    rank = Rank(rule(1, 1))
    rank.steps(1)
    rank.follow("gather")
    rank.ended()
    rank.go.clear()
    rank.follow("share")
    rank.moves.enter_group(range(2))
    rank.go.set()
    assert rank.stage() is Rebalancing.COUNTING
    assert all(exchange.placement == EVEN for exchange in rank.exchanges.values())


def test_restoring_brings_back_the_first_placement_and_its_number() -> None:
    rank = Rank(rule(1, 1))
    first = rank.moves.row()[1]
    rank.steps(1)
    rank.follow("gather")
    rank.ended()
    rank.follow("share")
    rank.ended()
    rank.follow("commit")
    assert rank.moves.row()[1] != first
    moved = rank.moves.row()[1]
    first_line = _line_of(EVEN) * len(LAYERS)
    rank.group.other = first_line  # the other rank tells where it has them
    rank.moves.restore(rank.group, teller=1)  # type: ignore[arg-type]
    assert rank.moves.row()[1] == first
    assert all(exchange.placement == EVEN for exchange in rank.exchanges.values())
    assert moved != first


def test_a_rank_that_started_again_takes_the_placement_that_it_is_told() -> None:
    rank = Rank(rule(1, 1))
    told = ExpertPlacement(
        4, ((3, 1, 0), (2, 3, 0)), ((9, WHOLE, 9), (WHOLE, WHOLE - 9, WHOLE - 9))
    )
    rank.group.other = _line_of(told) * len(LAYERS)
    rank.moves.restore(rank.group, teller=1)  # type: ignore[arg-type]
    for exchange in rank.exchanges.values():
        assert exchange.placement == told
        assert (exchange.weights.down[0] == 3).all()


def test_where_experts_do_not_move_ranks_that_differ_go_back_to_the_start() -> None:
    rank = Rank(RebalanceRule(window=1, interval=1, above=1.0, moves=False), even=THREE)
    rank.moves.enter_group((0, 2))
    assert rank.exchanges[1].placement.slots_of(1) == (EMPTY,) * 3
    rank.moves.enter_group(range(3))
    rank.moves.restore(rank.group, teller=0)  # type: ignore[arg-type]
    assert all(exchange.placement == THREE for exchange in rank.exchanges.values())
    assert rank.group.told == []


def test_a_change_of_shares_alone_is_in_place_as_soon_as_it_is_heard() -> None:
    rank = Rank(rule(1, 1), broken=True)  # nothing can be read
    rank.steps(1)
    rank.follow("gather")
    rank.ended()
    before = rank.moves.row()[1]
    wanted = ExpertPlacement(4, EVEN.slots, ((9, WHOLE, WHOLE), (WHOLE, WHOLE - 9, 0)))
    rank.group.other = None
    assert rank.moves._planning is not None
    rank.moves._planning.result = wanted
    rank.follow("share")
    assert rank.stage() is Rebalancing.READY  # for the second layer
    assert rank.exchanges[LAYERS[0]].placement == wanted
    assert rank.moves.row()[1] != before
    report = rank.moves.report
    assert report is not None
    assert report.shares[0] == (9, WHOLE, WHOLE)
    assert (report.placement_epoch, report.migrations) == (1, 0)


def test_experts_move_among_those_that_are_there() -> None:
    rank = Rank(rule(1, 1), even=THREE)
    rank.moves.enter_group((0, 2))
    rank.steps(1)
    rank.follow("gather")
    assert rank.ended() is Rebalancing.PLANNED
    rank.follow("share")
    assert rank.ended() is Rebalancing.STAGED
    rank.follow("commit")
    placement = rank.exchanges[LAYERS[0]].placement
    assert placement.slots_of(1) == (EMPTY,) * 3
    assert [slot // 3 for slot in placement.replicas_of(3)] == [0, 2]


def test_a_rank_that_comes_need_not_wait_long_for_its_experts() -> None:
    rank = Rank(rule(1, 9, above=99.0), even=THREE)
    rank.moves.enter_group((0, 2))
    rank.moves.enter_group(range(3))
    assert rank.exchanges[LAYERS[0]].placement.slots_of(1) == (EMPTY,) * 3
    rank.steps(1)
    assert rank.stage() is Rebalancing.READY
    rank.follow("gather")
    rank.ended()
    rank.follow("share")
    rank.ended()
    rank.follow("commit")
    assert rank.exchanges[LAYERS[0]].placement.slots_of(1) != (EMPTY,) * 3


def test_where_experts_stay_windows_are_only_reported() -> None:
    rank = Rank(rule(2, 2), moving=False)
    rank.steps(5)
    assert rank.stage() is Rebalancing.OFF
    assert rank.moves.report is not None
    assert rank.moves.report.tokens == ((4, 4, 4, 28),) * 2
    assert rank.moves.report.held == (EVEN.slots_of(0),) * 2


@pytest.mark.parametrize("other", [rule(2, 3), rule(1, 2), rule(1, 3, above=2.0)])
def test_ranks_with_other_rules_did_not_start_alike(other: RebalanceRule) -> None:
    assert Rank(rule(1, 3)).moves.row()[2] != Rank(other).moves.row()[2]
    assert Rank(rule(1, 3)).moves.row()[2] == Rank(rule(1, 3)).moves.row()[2]


def test_ranks_with_another_exchange_of_rows_did_not_start_alike() -> None:
    def started(choice: ExchangeChoice) -> int:
        moves = ExpertMoves(
            exchanges={},
            placements={},
            counts=None,
            seat=0,
            topology=Topology(2),
            mode="global",
            rule=rule(1, 3),
            alike=choice,
        )
        return moves.row()[2]

    assert started(ExchangeChoice()) == started(ExchangeChoice())
    others = [
        ExchangeChoice(transport="padded"),
        ExchangeChoice(payload="bf16"),
        ExchangeChoice(max_tokens_per_rank=32),
    ]
    assert started(ExchangeChoice()) not in {started(other) for other in others}
