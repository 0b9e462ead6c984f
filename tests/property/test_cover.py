"""Members of a group hold every expert between them, whoever is absent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.experts.cover import cover, least_ranks, with_absent, without_absent
from engine.experts.placement import EMPTY, WHOLE, ExpertPlacement, place_evenly, with_slots
from protocol.errors import ConfigError

SHAPES = [
    (256, 72, 32),
    (256, 72, 0),
    (384, 72, 16),
    (128, 72, 16),
    (30, 8, 4),
    (7, 5, 3),
    (1, 3, 0),
]


@st.composite
def losses(draw: st.DrawFn) -> tuple[ExpertPlacement, list[int]]:
    experts, ranks, redundant = draw(st.sampled_from(SHAPES))
    placement = place_evenly(experts, ranks, redundant)
    members = draw(
        st.lists(
            st.integers(0, ranks - 1), min_size=least_ranks(placement), max_size=ranks, unique=True
        )
    )
    return placement, members


@given(losses())
def test_only_members_hold_experts_and_they_hold_them_all(
    loss: tuple[ExpertPlacement, list[int]],
) -> None:
    before, members = loss
    after = cover(before, members)  # a placement is valid once it exists

    for rank, held in enumerate(after.slots):
        assert rank in members or set(held) == {EMPTY}
    assert cover(after, sorted(members)) == after
    alone = without_absent(after, sorted(members))
    assert alone.num_ranks == len(members)
    assert with_absent(alone, sorted(members), before.num_ranks) == after


@given(losses())
def test_an_expert_leaves_a_member_only_if_others_have_it(
    loss: tuple[ExpertPlacement, list[int]],
) -> None:
    before, members = loss
    after = cover(before, members)
    lost = set(range(before.num_experts)) - {
        expert for rank in members for expert in before.slots_of(rank)
    }

    changed = [
        (old, new)
        for rank in members
        for old, new in zip(before.slots_of(rank), after.slots_of(rank), strict=True)
        if old != new
    ]
    assert {new for _, new in changed} == lost
    assert len(changed) == len(lost)


def test_replicas_that_are_left_share_in_the_proportion_that_they_had() -> None:
    half, eighth = WHOLE // 2, WHOLE // 8
    before = ExpertPlacement(
        2, ((0, 1), (0, 1), (0, 1)), ((half, 0), (3 * eighth, WHOLE), (eighth, 0))
    )
    after = cover(before, [1, 2])
    assert after.slots == ((EMPTY, EMPTY), (0, 1), (0, 1))
    assert after.shares == ((0, 0), (6 * eighth, WHOLE), (2 * eighth, 0))
    # Of expert 1 only replicas are left that got nothing.
    assert [shares[1] for shares in cover(before, [0, 2]).shares] == [half, 0, half]


def test_what_must_be_read_is_spread_over_empty_slots() -> None:
    before = with_slots(place_evenly(56, 8), 10)
    survivors = [0, 1, 2, 4, 5, 6]
    after = cover(before, survivors)
    read = [len(set(after.slots_of(rank)) - set(before.slots_of(rank))) for rank in survivors]
    assert sorted(read) == [2, 2, 2, 2, 3, 3]


def test_ranks_with_too_few_slots_are_told_how_many_it_takes() -> None:
    placement = place_evenly(24, 4, 8)
    assert least_ranks(placement) == 3
    with pytest.raises(ConfigError, match="at least 3 ranks are needed"):
        cover(placement, [0, 3])
