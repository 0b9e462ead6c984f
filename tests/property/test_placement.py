"""Any number of experts fits on any number of ranks."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.experts.placement import EMPTY, ExpertPlacement, place_evenly
from protocol.errors import ConfigError

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


def check_view(placement: ExpertPlacement, rank: int) -> None:
    physical = [
        expert for held in map(placement.slots_of, range(placement.num_ranks)) for expert in held
    ]
    view = placement.slots_seen_from(rank)
    assert [physical[slot] for slot in view] == list(range(placement.num_experts))
    for expert, slot in enumerate(view):
        assert slot in placement.replicas_of(expert)
        if expert in placement.slots_of(rank):
            assert slot // placement.slots_per_rank == rank


@pytest.mark.parametrize(("num_experts", "num_ranks"), SHAPES)
@pytest.mark.parametrize("redundant", [0, 1, 32])
def test_the_shapes_of_real_models_fit(num_experts: int, num_ranks: int, redundant: int) -> None:
    placement = place_evenly(num_experts, num_ranks, redundant)
    check(placement, num_experts, num_ranks, redundant)
    for rank in (0, num_ranks - 1):
        check_view(placement, rank)


@given(st.integers(1, 80), st.integers(1, 20), st.integers(0, 60), st.data())
def test_every_shape_fits(
    num_experts: int, num_ranks: int, redundant: int, data: st.DataObject
) -> None:
    placement = place_evenly(num_experts, num_ranks, redundant)
    check(placement, num_experts, num_ranks, redundant)
    check_view(placement, data.draw(st.integers(0, num_ranks - 1)))


@given(st.integers(1, 80), st.integers(1, 20))
def test_without_replicas_ranks_differ_by_at_most_one_expert(
    num_experts: int, num_ranks: int
) -> None:
    placement = place_evenly(num_experts, num_ranks)
    held = [
        sum(expert != EMPTY for expert in placement.slots_of(rank)) for rank in range(num_ranks)
    ]
    assert max(held) - min(held) <= 1


def test_replicas_share_the_source_ranks_out() -> None:
    placement = ExpertPlacement(2, ((0, 1), (0, EMPTY), (EMPTY, EMPTY), (EMPTY, EMPTY)))
    seen = [placement.slots_seen_from(rank)[0] for rank in range(4)]
    assert seen == [0, 2, 0, 2]


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
