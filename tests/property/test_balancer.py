"""A balanced placement is always a right one, and even where the load allows it."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.experts.balancer import (
    WORTH_MOVING,
    Mode,
    balance,
    balance_of,
    leaves_idle,
    level,
    rank_loads,
    rebalance,
)
from engine.experts.placement import (
    EMPTY,
    WHOLE,
    ExpertPlacement,
    Topology,
    moves,
    place_evenly,
    shared_trays,
    slots_per_rank,
)
from engine.experts.replication import may_reach, replicate, replicate_to_fill
from protocol.errors import ConfigError

NVL72 = Topology(72, 4)
MODES: list[Mode] = ["global", "hierarchical"]
LOADS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 10_000)), min_size=1, max_size=40)


def zipf(exponent: float, num_experts: int = 256) -> list[float]:
    """Heavy experts are not neighbours: 7 has no factor in common with the number of experts."""
    by_rank = [(place + 1) ** -exponent for place in range(num_experts)]
    return [by_rank[7 * expert % num_experts] for expert in range(num_experts)]


def as_even_as_possible(copies: Sequence[int], topology: Topology) -> int:
    return sum(max(0, count - topology.num_trays) for count in copies)


@given(LOADS, st.integers(1, 6), st.integers(1, 4), st.integers(0, 30), st.sampled_from(MODES))
def test_a_balanced_placement_uses_every_slot_that_it_can(
    load: list[int], trays: int, ranks_per_tray: int, redundant: int, mode: Mode
) -> None:
    topology = Topology(trays * ranks_per_tray, ranks_per_tray)
    per_rank = slots_per_rank(len(load), topology.num_ranks, redundant)

    placement = balance(load, topology, per_rank, mode=mode)  # which validates itself

    copies = [len(replicas) for replicas in placement.replicas()]
    assert placement.slots_per_rank == per_rank
    assert sum(copies) == sum(replicate(load, topology.num_ranks, per_rank))
    assert sum(copies) == min(per_rank, len(load)) * topology.num_ranks
    if mode == "hierarchical":
        assert shared_trays(placement, topology) == as_even_as_possible(copies, topology)


@given(LOADS, st.data(), st.integers(1, 12), st.integers(0, 20), st.sampled_from(MODES))
def test_rebalancing_is_nearly_as_even_with_no_more_moves(
    load: list[int], data: st.DataObject, num_ranks: int, redundant: int, mode: Mode
) -> None:
    topology = Topology(num_ranks, data.draw(st.integers(1, num_ranks)))
    earlier = data.draw(st.lists(st.integers(0, 999), min_size=len(load), max_size=len(load)))
    current = balance(earlier, topology, slots_per_rank(len(load), num_ranks, redundant))
    fresh = balance(load, topology, current.slots_per_rank, mode=mode)

    after = rebalance(load, current, topology, mode=mode)

    assert balance_of(load, after).max_over_mean <= (
        balance_of(load, fresh).max_over_mean + WORTH_MOVING
    )
    assert moves(current, after) <= moves(current, fresh)
    if mode == "hierarchical":
        assert shared_trays(after, topology) <= shared_trays(fresh, topology)
    for old, new in zip(current.slots, after.slots, strict=True):
        stay = set(old) & set(new) - {EMPTY}
        assert [old.index(expert) for expert in stay] == [new.index(expert) for expert in stay]


def evenly_shared(placement: ExpertPlacement) -> ExpertPlacement:
    return ExpertPlacement(placement.num_experts, placement.slots)


@given(LOADS, st.data(), st.integers(1, 12), st.integers(0, 20))
def test_shares_that_follow_the_load_are_never_worse_than_equal_ones(
    load: list[int], data: st.DataObject, num_ranks: int, redundant: int
) -> None:
    topology = Topology(num_ranks)
    earlier = data.draw(st.lists(st.integers(0, 999), min_size=len(load), max_size=len(load)))
    placed = balance(earlier, topology, slots_per_rank(len(load), num_ranks, redundant))

    levelled = level(load, placed)

    assert levelled.slots == placed.slots
    for found in (levelled, balance(load, topology, placed.slots_per_rank)):
        assert max(rank_loads(load, found)) <= max(rank_loads(load, evenly_shared(found)))


@given(LOADS, st.integers(2, 12), st.integers(1, 20))
def test_no_load_could_go_from_a_rank_to_one_with_less(
    load: list[int], num_ranks: int, redundant: int
) -> None:
    placed = place_evenly(len(load), num_ranks, redundant)
    levelled = level(load, placed)
    loads = rank_loads(load, levelled)
    mean = sum(load) / num_ranks
    if balance_of(load, levelled) == balance_of(load, evenly_shared(levelled)):
        return  # equal shares are as good, and then they are taken
    for expert, slots in enumerate(levelled.replicas()):
        ranks = [slot // levelled.slots_per_rank for slot in slots]
        giving = [
            rank
            for rank in ranks
            if levelled.shares[rank][levelled.slots[rank].index(expert)] > WHOLE // 50
        ]
        if load[expert]:
            assert max((loads[rank] for rank in giving), default=0.0) <= (
                min(loads[rank] for rank in ranks) + 0.02 * mean
            )


@given(LOADS, st.integers(1, 12), st.integers(0, 20))
def test_there_are_as_many_copies_as_slots_can_hold(
    load: list[int], num_ranks: int, redundant: int
) -> None:
    per_rank = slots_per_rank(len(load), num_ranks, redundant)
    copies, least = replicate_to_fill(load, num_ranks, per_rank, lambda: None)
    assert sum(copies) == sum(replicate(load, num_ranks, per_rank))
    assert all(1 <= count <= num_ranks for count in copies)
    assert 1 <= least <= max(1, num_ranks)


def test_an_expert_with_too_few_replicas_is_known_before_it_is_tried() -> None:
    load = [100, *[10] * 8]  # on three ranks of 60
    assert may_reach(load, [2, *[1] * 8], 3, 4, 1.2)
    assert not may_reach(load, [1, *[1] * 8], 3, 4, 1.6)
    assert not may_reach(load, [2, *[1] * 8], 3, 4, 0.9)


@given(LOADS, st.integers(1, 12), st.integers(0, 20), st.sampled_from(MODES))
def test_equal_loads_are_placed_alike(
    load: list[int], num_ranks: int, redundant: int, mode: Mode
) -> None:
    topology = Topology(num_ranks, 2)
    per_rank = slots_per_rank(len(load), num_ranks, redundant)
    first, second = (balance(load, topology, per_rank, mode=mode) for _ in range(2))
    assert first == second


def test_a_load_that_other_shares_can_level_moves_nothing() -> None:
    slots = ((0, 1), (0, 2), (0, 3))
    current = ExpertPlacement(4, slots)
    load = [300, 10, 100, 200]
    after = rebalance(load, current, Topology(3))
    assert moves(current, after) == 0
    assert after.slots == slots
    assert balance_of(load, after).max_over_mean == pytest.approx(1, abs=1e-3)
    assert balance_of(load, current).max_over_mean > 1.4


def test_a_rank_that_holds_nothing_gets_experts_though_the_others_are_even() -> None:
    current = ExpertPlacement(4, ((0, 1, EMPTY), (2, 3, EMPTY), (EMPTY, EMPTY, EMPTY)))
    assert leaves_idle(current)
    for load in ([0, 0, 0, 0], [5, 5, 5, 5]):
        assert not leaves_idle(rebalance(load, current, Topology(3)))


def test_ranks_of_a_group_with_absent_seats_keep_replicas_in_different_trays() -> None:
    topology = Topology(8, 2).among((0, 1, 2, 4, 5, 7))
    placement = balance([50, 30, 5, 5, 5, 5], topology, 3, mode="hierarchical")
    copies = [len(replicas) for replicas in placement.replicas()]
    assert shared_trays(placement, topology) == as_even_as_possible(copies, topology)


def test_thirty_heavy_experts_among_idle_ones_are_even_to_five_percent() -> None:
    """As an untrained router chooses: nearly a heavy expert to every second rank."""
    heavy = [2.3, *(1.8 - 0.025 * n for n in range(30))]
    middle = [0.98 * 0.965**n for n in range(90)]
    load = heavy + middle + [0.0] * (256 - len(heavy) - len(middle))
    placement = balance(load, NVL72, 4, mode="hierarchical")
    assert balance_of(load, placement).max_over_mean <= 1.02
    assert balance_of(load, evenly_shared(placement)).max_over_mean > 1.2


@given(LOADS, st.integers(1, 12), st.integers(0, 20))
def test_load_is_shared_out_whole_and_the_bound_holds(
    load: list[int], num_ranks: int, redundant: int
) -> None:
    placement = place_evenly(len(load), num_ranks, redundant)
    assert sum(rank_loads(load, placement)) == pytest.approx(sum(load))
    found = balance_of(load, balance(load, Topology(num_ranks), placement.slots_per_rank))
    assert found.bound <= balance_of(load, placement).max_over_mean + 1e-9
    assert found.bound <= found.max_over_mean + 1e-9


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("exponent", [0.3, 0.5, 0.8, 0.9])
def test_skewed_load_on_72_ranks_is_even_to_five_percent(exponent: float, mode: Mode) -> None:
    load = zipf(exponent)
    assert balance_of(load, place_evenly(256, 72, 32)).max_over_mean > 1.5
    found = balance_of(load, balance(load, NVL72, 4, mode=mode))
    assert found.max_over_mean <= 1.05
    assert found.balancedness == pytest.approx(1 / found.max_over_mean)


@pytest.mark.parametrize("exponent", [0.5, 0.7, 0.8, 0.9, 1.0, 1.2])
def test_the_documents_have_what_the_balancer_finds(exponent: float) -> None:
    load = zipf(exponent)
    even = balance_of(load, place_evenly(256, 72, 32))
    four, five = (
        balance_of(load, balance(load, NVL72, slots, mode="hierarchical")) for slots in (4, 5)
    )
    line = (
        f"| {exponent} | {max(load) / sum(load):.1%} | {even.max_over_mean:.2f} "
        f"| {four.max_over_mean:.3f} | {four.bound:.3f} | {five.max_over_mean:.3f} |"
    )
    assert line in (Path(__file__).parents[2] / "docs" / "wide-ep.md").read_text()


def test_load_that_288_slots_cannot_spread_is_even_with_more_slots() -> None:
    """The heaviest expert of Zipf's law with exponent 1 needs twelve ranks nearly for itself."""
    load = zipf(1.0)
    assert balance_of(load, balance(load, NVL72, 4)).max_over_mean > 1.05
    assert balance_of(load, balance(load, NVL72, 5)).max_over_mean <= 1.05


def test_the_bound_says_when_one_expert_is_too_hot() -> None:
    load = [1000.0, 1.0, 1.0]
    found = balance_of(load, balance(load, Topology(3), 1))
    assert found.bound == found.max_over_mean == pytest.approx(1000 / 334)


def test_drifting_load_moves_a_part_of_the_experts() -> None:
    load = zipf(0.8)
    current = balance(load, NVL72, 4)
    drifted = [amount * (1.2 if expert % 3 else 0.8) for expert, amount in enumerate(load)]
    after = rebalance(drifted, current, NVL72)
    assert 0 < moves(current, after) < moves(current, balance(drifted, NVL72, 4)) / 2


def test_an_even_placement_stays() -> None:
    load = zipf(0.8)
    current = balance(load, NVL72, 4)
    assert rebalance([2 * amount for amount in load], current, NVL72) is current


def test_no_load_is_balanced() -> None:
    assert balance_of([0, 0, 0], balance([0, 0, 0], Topology(2), 2)).max_over_mean == 1


@pytest.mark.parametrize("load", [[], [1.0, -1.0], [float("nan")], [float("inf"), 1.0]])
def test_a_load_without_meaning_is_refused(load: list[float]) -> None:
    with pytest.raises(ConfigError, match="finite number"):
        balance(load, Topology(2), 1)


def test_too_few_slots_are_refused_with_the_number_that_is_needed() -> None:
    with pytest.raises(ConfigError, match="at least 3 slots"):
        balance([1.0] * 5, Topology(2), 2)


def test_a_load_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="4 experts on 2 ranks does not fit"):
        rebalance([1.0] * 4, ExpertPlacement(3, ((0, 1), (2, EMPTY))), Topology(2))
