"""Several callers on one decode rank that is too small for all."""

import pytest

from decode.scheduler import DecodeScheduler, Reservation
from protocol.errors import Overloaded
from protocol.holdings import Holding, fair_part, room_from_others, room_kept
from tests.support.decode_books import BLOCK_TOKENS, TOKEN, a_ref, a_scheduler, running, step


def reserve(
    scheduler: DecodeScheduler, name: str, blocks: int, *, priority: int = 0
) -> Reservation:
    """The caller is the letter that the name begins with."""
    return scheduler.reserve(
        a_ref(name),
        blocks * BLOCK_TOKENS - 1,
        blocks * BLOCK_TOKENS + 12,
        caller=name[0],
        priority=priority,
    )


def join(scheduler: DecodeScheduler, name: str, blocks: int, *, priority: int = 0) -> None:
    reserve(scheduler, name, blocks, priority=priority)
    scheduler.commit(a_ref(name), TOKEN)


def gave_way(reservation: Reservation) -> list[str]:
    return [swap.ref.request_id for swap in reservation.swap_out]


def test_the_youngest_of_whoever_holds_too_much_gives_way_to_a_caller_without_its_part() -> None:
    scheduler = a_scheduler(20)
    for number in range(5):
        join(scheduler, f"a{number}", 4)
    assert gave_way(reserve(scheduler, "b0", 3)) == ["a4"]
    assert scheduler.state(a_ref("b0")) == "granted"


def test_what_is_swapped_out_does_not_keep_out_a_caller_without_its_part() -> None:
    scheduler = a_scheduler(20)
    for number in range(4):
        join(scheduler, f"a{number}", 5)
    step(scheduler)
    step(scheduler)
    assert scheduler.books().swapped_requests == 1
    with pytest.raises(Overloaded):
        reserve(scheduler, "a9", 1)
    assert gave_way(reserve(scheduler, "b0", 1)) == [], "b holds less than those who wait"


def test_nobody_gives_way_for_more_than_a_callers_part() -> None:
    scheduler = a_scheduler(20)
    for number in range(5):
        join(scheduler, f"a{number}", 4)
    reserve(scheduler, "b0", 4)
    reserve(scheduler, "b1", 4)
    with pytest.raises(Overloaded):
        reserve(scheduler, "b2", 4)
    assert scheduler.books().granted == 8


def test_whoever_is_within_its_part_never_gives_way() -> None:
    scheduler = a_scheduler(21)
    for caller in "abc":
        join(scheduler, f"{caller}0", 7)
    with pytest.raises(Overloaded):
        reserve(scheduler, "a1", 1)
    assert scheduler.books().swapped_requests == 0


def test_growing_costs_the_caller_that_holds_most_and_not_the_youngest() -> None:
    scheduler = a_scheduler(12)
    join(scheduler, "a0", 4)
    join(scheduler, "a1", 4)
    join(scheduler, "b0", 4)
    step(scheduler)
    plan = step(scheduler)
    assert [swap.ref.request_id for swap in plan.swap_out] == ["a1"]
    assert running(plan) == ["a0", "b0"]


def test_the_caller_that_holds_least_resumes_first() -> None:
    scheduler = a_scheduler(12)
    for name in ("a0", "a1", "b0"):
        join(scheduler, name, 4)
    for name in ("c0", "c1"):  # a1 gives way, then nobody holds more than its part
        if name == "c0":
            assert gave_way(reserve(scheduler, name, 4)) == ["a1"]
        else:
            with pytest.raises(Overloaded):
                reserve(scheduler, name, 4)
    scheduler.commit(a_ref("c0"), TOKEN)
    step(scheduler)
    plan = step(scheduler)  # each needs a block; the youngest of equals goes
    assert [swap.ref.request_id for swap in plan.swap_out] == ["c0"]
    scheduler.finish(a_ref("b0"))
    plan = step(scheduler)
    assert [swap.ref.request_id for swap in plan.swap_in] == ["c0"], "a1 is older, c holds less"


def test_what_was_brought_back_stays_until_its_copy_has_paid() -> None:
    scheduler = a_scheduler(13)
    join(scheduler, "a0", 10)
    assert gave_way(reserve(scheduler, "b0", 4)) == ["a0"]
    scheduler.commit(a_ref("b0"), TOKEN)
    with pytest.raises(Overloaded):  # the one that is out comes first now
        reserve(scheduler, "c0", 1)
    scheduler.finish(a_ref("b0"))
    came_back = step(scheduler)
    assert [swap.ref.request_id for swap in came_back.swap_in] == ["a0"]
    tokens = 1
    while True:
        try:
            assert gave_way(reserve(scheduler, "b1", 4)) == ["a0"]
            break
        except Overloaded:
            step(scheduler)
            tokens += 1
    assert tokens == 10, "as many as blocks were copied"


def test_a_higher_priority_makes_lower_ones_give_way_and_not_the_other_way_round() -> None:
    scheduler = a_scheduler(8)
    join(scheduler, "a0", 4, priority=1)
    join(scheduler, "b0", 4)
    with pytest.raises(Overloaded):
        reserve(scheduler, "d0", 1, priority=-1)
    assert gave_way(reserve(scheduler, "e0", 4, priority=1)) == ["b0"]


def test_callers_take_turns_in_a_batch_that_is_too_small() -> None:
    scheduler = a_scheduler(32, max_batch=4)
    for number in range(6):
        join(scheduler, f"a{number}", 1)
    assert running(step(scheduler)) == ["a0", "a1", "a2", "a3"]
    join(scheduler, "b0", 1)
    assert running(step(scheduler)) == ["a0", "a1", "a2", "b0"]
    scheduler.finish(a_ref("b0"))
    assert running(step(scheduler)) == ["a0", "a1", "a2", "a3"]


def a_holding(
    caller: str, blocks: int, *, priority: int = 0, yielding: int | None = None, swapped: int = 0
) -> Holding:
    return Holding(
        caller=caller,
        priority=priority,
        blocks=blocks,
        yielding=blocks if yielding is None else yielding,
        swapped_requests=swapped,
    )


def room(*holdings: Holding, caller: str = "new", priority: int = 0) -> int:
    return room_from_others(holdings, caller=caller, priority=priority, total_blocks=100)


def test_the_room_that_others_make_ends_at_a_callers_part() -> None:
    assert room(a_holding("a", 100)) == 50
    assert room(a_holding("a", 60), a_holding("new", 40)) == 10
    assert room(a_holding("a", 50), a_holding("new", 50)) == 0
    assert room(a_holding("a", 100, yielding=5)) == 5
    assert room(a_holding("a", 100), a_holding("new", 0, swapped=1)) == 0
    assert room(a_holding("a", 100), caller="a") == 0
    assert room(a_holding("a", 100), priority=1) == 100
    assert room(a_holding("a", 100), priority=-1) == 0
    assert fair_part(100, 0, [a_holding("a", 40, priority=1), a_holding("b", 60)]) == 30


def test_spare_blocks_are_for_whoever_waits_unless_the_caller_holds_less() -> None:
    waits = a_holding("a", 10, swapped=1)

    def kept(*holdings: Holding, priority: int = 0) -> int:
        return room_kept(holdings, caller="new", priority=priority, spare_blocks=7)

    assert kept(waits) == 7
    assert kept(waits, a_holding("new", 10)) == 0
    assert kept(waits, a_holding("new", 10), priority=1) == 7
    assert kept(waits, priority=-1) == 0
    assert kept(a_holding("a", 0, swapped=1)) == 0
    assert kept(a_holding("a", 90)) == 7
