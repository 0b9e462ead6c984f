"""No rank may ever skip a collective, whatever the ranks are doing."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode.lockstep import ROW_WIDTH, RankState, Rebalancing, StepPlan, StepRow, decide
from protocol.errors import ProtocolError

LAYERS = 2
MAX_STEPS = 200


def row(
    state: RankState = RankState.SERVING,
    tokens: int = 0,
    *,
    expecting: bool = False,
    seat: int = 0,
) -> StepRow:
    return StepRow(
        seat=seat, epoch=3, state=state, tokens=tokens, expecting=expecting, free_blocks=9
    )


def plan_of(rows: Sequence[StepRow], least_ranks: int | None = None) -> StepPlan:
    """With slots for every expert on all ranks together only, unless said otherwise."""
    seated = [replace(each, seat=seat) for seat, each in enumerate(rows)]
    return decide(seated, least_ranks=least_ranks or len(seated))


ROWS = [
    row(),
    row(expecting=True),
    row(tokens=1),
    row(tokens=4, expecting=True),
    row(RankState.DRAINING),
    row(RankState.DRAINING, expecting=True),
    row(RankState.DRAINING, tokens=2),
    row(RankState.LEAVING),
]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_combination_of_ranks_has_one_plan_that_serves_all(world_size: int) -> None:
    for rows in product(ROWS, repeat=world_size):
        plan = plan_of(rows)

        assert plan.tokens_of_rank == tuple(each.tokens for each in rows)
        has_tokens = any(each.tokens for each in rows)
        all_left = all(each.state is RankState.LEAVING for each in rows)
        assert (plan.kind == "decode") == has_tokens
        assert (plan.kind == "stop") == all_left
        assert (plan.pace_s > 0) == (plan.kind == "idle")
        assert plan.draining == any(each.state is not RankState.SERVING for each in rows)


@pytest.mark.parametrize("least_ranks", [1, 2, 3])
def test_a_rank_leaves_a_group_that_has_slots_enough_without_it(least_ranks: int) -> None:
    for rows in product(ROWS, repeat=3):
        plan = plan_of(rows, least_ranks)

        serving = [seat for seat, each in enumerate(rows) if each.state is RankState.SERVING]
        gone = [seat for seat, each in enumerate(rows) if each.state is RankState.LEAVING]
        may_leave = bool(gone) and len(serving) >= least_ranks
        assert (plan.kind == "regroup") == may_leave
        assert plan.leaving == (tuple(gone) if may_leave else ())


def test_a_group_ends_when_somebody_waits_to_join_it() -> None:
    waiting = replace(row(tokens=3), newcomers=True)
    for other in ROWS:
        plan = plan_of([other, waiting])
        assert (plan.kind, plan.leaving, plan.experts) == ("regroup", (), "keep")


def test_an_expected_request_quickens_the_pace_of_idle_ranks() -> None:
    assert plan_of([row(), row(expecting=True)]).pace_s < plan_of([row(), row()]).pace_s


@given(
    st.builds(
        StepRow,
        seat=st.integers(0, 71),
        epoch=st.integers(0, 2**40),
        state=st.sampled_from(RankState),
        tokens=st.integers(0, 4096),
        expecting=st.booleans(),
        free_blocks=st.integers(0, 2**30),
        rebalancing=st.sampled_from(Rebalancing),
        placement=st.integers(0, 2**63 - 1),
        started_with=st.integers(0, 2**63 - 1),
        newcomers=st.booleans(),
    )
)
def test_a_row_survives_the_way_to_other_ranks(sent: StepRow) -> None:
    assert StepRow.from_ints(sent.to_ints()) == sent


class Rank:
    """A rank's loop, with the collectives it would call written down.

    ``arrivals[i]`` is the length of a request that comes before its i-th step, 0 for none.
    """

    def __init__(self, arrivals: tuple[int, ...], drain_at: int) -> None:
        self._arrivals = deque(arrivals)
        self._drain_at = drain_at
        self._requests: list[int] = []
        self._steps = 0
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.generated = 0
        self.stopped = False

    def row(self) -> StepRow:
        draining = self._steps >= self._drain_at
        if self._arrivals and not draining and (length := self._arrivals.popleft()):
            self._requests.append(length)
        self._steps += 1
        self.calls.append(("rows", ()))
        state = RankState.SERVING
        if draining:
            state = RankState.DRAINING if self._requests else RankState.LEAVING
        return row(state, len(self._requests), expecting=any(self._arrivals) and not draining)

    def follow(self, plan: StepPlan) -> None:
        self.stopped = plan.kind == "stop"
        if plan.kind == "decode":
            self.calls += [("experts", plan.tokens_of_rank)] * LAYERS
            self.generated += len(self._requests)
            self._requests = [left - 1 for left in self._requests if left > 1]


LIVES = st.tuples(
    st.lists(st.integers(0, 5), max_size=6).map(tuple), st.integers(min_value=0, max_value=30)
)


@given(st.lists(LIVES, min_size=1, max_size=5))
def test_all_ranks_call_the_same_collectives_until_all_have_left(
    lives: list[tuple[tuple[int, ...], int]],
) -> None:
    ranks = [Rank(arrivals, drain_at) for arrivals, drain_at in lives]
    for _ in range(MAX_STEPS):
        rows = [StepRow.from_ints(rank.row().to_ints()) for rank in ranks]
        for rank in ranks:  # each decides for itself
            rank.follow(plan_of(rows))
        if ranks[0].stopped:
            break

    assert all(rank.stopped for rank in ranks)
    assert all(rank.calls == ranks[0].calls for rank in ranks)
    admitted = [sum(arrivals[:drain_at]) for arrivals, drain_at in lives]
    assert [rank.generated for rank in ranks] == admitted


def test_ranks_of_different_epochs_do_not_step_together() -> None:
    other = replace(row(), epoch=4)
    with pytest.raises(ProtocolError, match=r"\[3, 4\]"):
        plan_of([row(), other])


def test_a_rank_that_leaves_with_tokens_is_refused_by_name() -> None:
    with pytest.raises(ProtocolError, match="seat 1 is LEAVING with 2 tokens"):
        plan_of([row(), row(RankState.LEAVING, 2)])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_experts_move_only_when_every_rank_is_at_the_same_point(world_size: int) -> None:
    for stages in product(Rebalancing, repeat=world_size):
        rows = [replace(row(tokens=1), rebalancing=stage) for stage in stages]
        plan = plan_of(rows).experts
        if Rebalancing.FAILED in stages:
            assert plan == "abandon"
        else:
            assert (plan == "gather") == (set(stages) == {Rebalancing.READY})
            assert (plan == "commit") == (set(stages) == {Rebalancing.STAGED})
            assert (plan == "share") == (Rebalancing.PLANNED in stages)


def test_experts_stay_while_ranks_leave() -> None:
    rows = [replace(row(RankState.LEAVING), rebalancing=Rebalancing.STAGED)] * 2
    assert (plan_of(rows).kind, plan_of(rows).experts) == ("stop", "keep")


@pytest.mark.parametrize("tokens", [0, 3])
def test_ranks_with_different_placements_do_not_compute(tokens: int) -> None:
    moved = replace(row(tokens=tokens), placement=5, rebalancing=Rebalancing.STAGED)
    plan = plan_of([replace(moved, placement=7), moved, moved])
    assert (plan.kind, plan.experts, plan.teller) == ("restore", "keep", 1)


def test_ranks_that_started_differently_are_refused_by_name() -> None:
    odd = replace(row(), started_with=1)
    with pytest.raises(ProtocolError, match=r"ranks \[1, 3\] started with another"):
        plan_of([row(), odd, row(), odd])


@pytest.mark.parametrize("ints", [(), (1, 0, 0, 0, 0, 2), (0,) * (ROW_WIDTH - 1) + (1,)])
def test_a_row_of_another_release_is_refused(ints: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError, match="same release"):
        StepRow.from_ints(ints)


def test_the_skew_is_between_who_waited_longest_and_who_came_last() -> None:
    rows = [replace(row(), waited_us=waited) for waited in (120, 30, 500)]
    assert plan_of(rows).skew_us == 470
    assert StepRow.from_ints(rows[0].to_ints()) == rows[0]
