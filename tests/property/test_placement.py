"""Any number of experts fits on any number of ranks."""

from collections import Counter
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.experts.placement import (
    EMPTY,
    WHOLE,
    ExpertPlacement,
    Topology,
    keeping_slots,
    moves,
    place_evenly,
    shares_by,
    with_slots,
)
from protocol.errors import ConfigError

W = WHOLE
SHAPES = [(256, 72), (384, 72), (128, 72), (896, 72), (30, 8), (7, 5), (1, 3), (24, 2), (24, 1)]


def check(placement: ExpertPlacement, num_experts: int, num_ranks: int, redundant: int) -> None:
    per_rank = -(-(num_experts + redundant) // num_ranks)
    assert placement.num_ranks == num_ranks
    assert placement.slots_per_rank == per_rank
    copies: Counter[int] = Counter()
    for rank in range(num_ranks):
        held = [expert for expert in placement.slots_of(rank) if expert != EMPTY]
        assert len(set(held)) == len(held)
        copies.update(held)
    assert set(copies) == set(range(num_experts))
    # As many copies as asked for, as far as each needs a rank of its own.
    assert sum(copies.values()) == min(num_experts + redundant, num_experts * num_ranks)
    assert max(copies.values()) - min(copies.values()) <= 1


@pytest.mark.parametrize(("num_experts", "num_ranks"), SHAPES)
@pytest.mark.parametrize("redundant", [0, 1, 32])
def test_the_shapes_of_real_models_fit(num_experts: int, num_ranks: int, redundant: int) -> None:
    placement = place_evenly(num_experts, num_ranks, redundant)
    check(placement, num_experts, num_ranks, redundant)


@given(st.integers(1, 80), st.integers(1, 20), st.integers(0, 60))
def test_every_shape_fits(num_experts: int, num_ranks: int, redundant: int) -> None:
    placement = place_evenly(num_experts, num_ranks, redundant)
    check(placement, num_experts, num_ranks, redundant)


@given(st.integers(1, 80), st.integers(1, 20))
def test_without_replicas_ranks_differ_by_at_most_one_expert(
    num_experts: int, num_ranks: int
) -> None:
    placement = place_evenly(num_experts, num_ranks)
    held = [
        sum(expert != EMPTY for expert in placement.slots_of(rank)) for rank in range(num_ranks)
    ]
    assert max(held) - min(held) <= 1


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 6), st.integers(0, 80))
def test_replicas_are_in_as_many_trays_as_there_are(
    num_experts: int, trays: int, ranks_per_tray: int, redundant: int
) -> None:
    topology = Topology(trays * ranks_per_tray, ranks_per_tray)
    placement = place_evenly(num_experts, topology.num_ranks, redundant)
    for replicas in placement.replicas():
        ranks = [slot // placement.slots_per_rank for slot in replicas]
        assert len({topology.tray_of(rank) for rank in ranks}) == min(len(ranks), trays)


def test_a_topology_without_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Topology(8, 0)


def test_the_last_tray_may_have_fewer_ranks() -> None:
    topology = Topology(7, 3)
    assert [topology.tray_of(rank) for rank in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    assert topology.num_trays == 3


def test_ranks_keep_their_trays_when_others_are_absent() -> None:
    topology = Topology(8, 2).among((0, 3, 6, 7))
    assert topology.num_ranks == 4
    assert [topology.tray_of(rank) for rank in range(4)] == [0, 1, 3, 3]
    assert topology.num_trays == 3


def test_replicas_are_listed_by_expert() -> None:
    placement = ExpertPlacement(2, ((0, 1), (0, EMPTY)))
    assert placement.replicas() == ((0, 2), (1,))
    assert placement.has_replicas
    assert not place_evenly(5, 3).has_replicas


def test_an_expert_that_stays_keeps_its_slot() -> None:
    before = ExpertPlacement(4, ((0, 1, EMPTY, EMPTY), (2, 3, EMPTY, EMPTY)))
    after = ExpertPlacement(4, ((1, 2, 3, EMPTY), (0, 1, EMPTY, EMPTY)))
    kept = keeping_slots(before, after)
    assert kept.slots == ((2, 1, 3, EMPTY), (0, 1, EMPTY, EMPTY))
    assert moves(before, kept) == moves(before, after) == 4


def test_a_share_goes_where_its_expert_goes() -> None:
    before = ExpertPlacement(3, ((0, 1, EMPTY), (2, 1, EMPTY)))
    after = ExpertPlacement(3, ((1, 2, EMPTY), (0, 1, EMPTY)), ((9, W, 0), (W, W - 9, 0)))
    kept = keeping_slots(before, after)
    assert kept.slots == ((2, 1, EMPTY), (0, 1, EMPTY))
    assert kept.shares == ((W, 9, 0), (W, W - 9, 0))
    assert with_slots(kept, 4).shares == ((W, 9, 0, 0), (W, W - 9, 0, 0))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 40))
def test_replicas_share_evenly_unless_they_are_told_otherwise(
    num_experts: int, num_ranks: int, redundant: int
) -> None:
    placement = place_evenly(num_experts, num_ranks, redundant)
    shares = list(chain.from_iterable(placement.shares))
    for slots in placement.replicas():
        assert sum(shares[slot] for slot in slots) == WHOLE
        assert max(shares[slot] for slot in slots) - min(shares[slot] for slot in slots) <= 1


@given(
    st.lists(st.lists(st.floats(0, 1e9), min_size=3, max_size=3), min_size=3, max_size=3),
)
def test_shares_follow_any_weights_and_add_up_to_the_whole(weights: list[list[float]]) -> None:
    slots = ((0, 1, 2), (1, 0, EMPTY), (2, 1, 0))
    placement = ExpertPlacement(3, slots, shares_by(slots, weights))  # which validates itself
    of_expert = [
        [
            (weights[rank][held.index(expert)], placement.shares[rank][held.index(expert)])
            for rank, held in enumerate(slots)
            if expert in held
        ]
        for expert in range(3)
    ]
    for pairs in of_expert:
        total = sum(weight for weight, _ in pairs)
        for weight, share in pairs:
            wanted = weight / total if total else 1 / len(pairs)
            assert abs(share / WHOLE - wanted) < 2 / WHOLE


@pytest.mark.parametrize(
    ("shares", "reason"),
    [
        (((W, 5), (W - 6, W)), r"shares of experts \[1\] do not add up"),
        (((W, -1), (W + 1, W)), "at least 0"),
        (((W, 5, 0), (W - 5, W)), "one share for each"),
        (((W, 5),), "one share for each"),
    ],
)
def test_shares_that_are_no_whole_are_refused(
    shares: tuple[tuple[int, ...], ...], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        ExpertPlacement(3, ((0, 1), (1, 2)), shares)


def test_an_empty_slot_has_no_share() -> None:
    with pytest.raises(ConfigError, match="0 where there is no expert"):
        ExpertPlacement(1, ((0, EMPTY),), ((W, 1),))


@pytest.mark.parametrize(
    ("slots", "reason"),
    [
        (((0, 1), (2,)), "same number"),
        (((0, 0), (1, 2)), "rank 0 holds an expert twice"),
        (((0, 1), (2, 3)), "only 3"),
        (((0, 1), (1, EMPTY)), r"without a slot: \[2\]"),
        ((), "at least one rank"),
    ],
)
def test_an_impossible_placement_is_refused(
    slots: tuple[tuple[int, ...], ...], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        ExpertPlacement(3, slots)


@pytest.mark.parametrize(("experts", "ranks", "redundant"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_counts_out_of_range_are_refused(experts: int, ranks: int, redundant: int) -> None:
    with pytest.raises(ConfigError, match="cannot place"):
        place_evenly(experts, ranks, redundant)
