"""Two batches a step where they were measured to be quicker, decided alike on every rank."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from decode.two_batches import HELD_STEPS, TRIALS, TwoBatches, pays


def run(rule: TwoBatches, steps: int, *, one_us: int, two_us: int, tokens: int = 64) -> list[bool]:
    """The decisions of so many steps that take as long as is said."""
    found: list[bool] = []
    for _ in range(steps):
        last_us = (two_us if found[-1] else one_us) if found else 0
        found.append(rule.decide((tokens, 0), last_us))
    return found


def test_both_are_tried_in_turn_and_the_quicker_serves() -> None:
    decided = run(TwoBatches("measure", possible=True), 200, one_us=1000, two_us=700)
    trial, after = decided[: 2 * TRIALS], decided[2 * TRIALS :]
    assert all(one is not other for one, other in pairwise(trial))
    assert all(after)


def test_two_batches_are_off_where_they_lose_or_gain_nothing() -> None:
    for two_us in (1400, 1000, 990):
        decided = run(TwoBatches("measure", possible=True), 200, one_us=1000, two_us=two_us)
        assert not any(decided[2 * TRIALS :])


def test_what_pays_is_tried_again_after_a_while() -> None:
    rule = TwoBatches("measure", possible=True)
    assert all(run(rule, 2 * TRIALS + HELD_STEPS, one_us=1000, two_us=500)[2 * TRIALS :])
    later = run(rule, 2 * TRIALS + 100, one_us=1000, two_us=2000)
    assert not any(later[2 * TRIALS + 1 :])


def test_sizes_are_told_apart() -> None:
    rule = TwoBatches("measure", possible=True)
    run(rule, 100, one_us=1000, two_us=1500, tokens=4)
    large = run(rule, 100, one_us=1000, two_us=500, tokens=256)
    assert large[-1]
    assert not run(rule, 10, one_us=1000, two_us=1500, tokens=3)[-1]


def test_a_step_of_single_tokens_is_never_halved() -> None:
    assert not TwoBatches("always", possible=True).decide((1, 0, 1), 0)
    assert TwoBatches("always", possible=True).decide((1, 2, 0), 0)


def test_where_it_is_impossible_it_never_happens() -> None:
    assert not TwoBatches("always", possible=False).decide((64, 64), 0)
    assert not any(run(TwoBatches("never", possible=True), 50, one_us=1000, two_us=1))


def test_after_ranks_have_met_anew_nothing_is_known() -> None:
    rule = TwoBatches("measure", possible=True)
    run(rule, 37, one_us=1000, two_us=300)
    rule.reset()
    fresh = TwoBatches("measure", possible=True)
    assert run(rule, 60, one_us=5, two_us=9) == run(fresh, 60, one_us=5, two_us=9)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300), st.integers(0, 10**6))))
def test_ranks_that_see_the_same_rows_decide_alike(steps: list[tuple[int, int, int]]) -> None:
    ranks = [TwoBatches("measure", possible=True) for _ in range(2)]
    for first, second, last_us in steps:
        assert len({rank.decide((first, second), last_us) for rank in ranks}) == 1


def test_the_median_decides_not_a_stray_step() -> None:
    assert pays([100, 100, 100, 5], [80, 80, 80, 900])
    assert not pays([100, 100, 100, 900], [98, 98, 98, 5])
