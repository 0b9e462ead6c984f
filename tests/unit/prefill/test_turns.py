"""Whose prompt is computed next where several callers have some."""

import pytest

from prefill.scheduler import PrefillScheduler
from protocol.errors import Overloaded
from protocol.ids import AttemptRef
from tests.support.generation import a_request
from tests.support.prefill_books import a_scheduler, ranges, run


def add(
    scheduler: PrefillScheduler, name: str, num_tokens: int, *, caller: str, priority: int = 0
) -> AttemptRef | None:
    """Who had to leave the queue for it."""
    start = sum(map(ord, name)) * 1000
    prompt = range(start, start + num_tokens)
    return scheduler.add(a_request(name, prompt=prompt, caller=caller, priority=priority), 0.0)


def names(scheduler: PrefillScheduler) -> list[str]:
    """Of those that are computed in the next step."""
    return [name for name, _, _ in run(scheduler)]


def test_who_comes_after_a_flood_waits_for_a_step_and_not_for_the_flood() -> None:
    scheduler = a_scheduler(max_batch_tokens=16)
    for index in range(3):
        add(scheduler, f"flood{index}", 32, caller="flood")
    assert run(scheduler) == [("flood0", 0, 16)]
    add(scheduler, "quiet", 6, caller="quiet")
    assert run(scheduler) == [("quiet", 0, 6), ("flood0", 16, 24)]
    assert run(scheduler) == [("flood0", 24, 32), ("flood1", 0, 8)]


def test_callers_take_turns_by_the_tokens_that_were_computed_for_them() -> None:
    scheduler = a_scheduler(max_batch_tokens=8)
    add(scheduler, "long", 32, caller="a")
    for index in range(4):
        add(scheduler, f"short{index}", 4, caller="b")
    assert [names(scheduler) for _ in range(6)] == [
        ["long"],
        ["short0", "short1"],
        ["long"],
        ["short2", "short3"],
        ["long"],
        ["long"],
    ]


def test_prefix_hits_are_not_charged() -> None:
    scheduler = a_scheduler(max_batch_tokens=8)
    scheduler.add(a_request("first", prompt=range(8), caller="a"), 0.0)
    run(scheduler)
    scheduler.add(a_request("again", prompt=range(9), caller="a"), 0.0)
    scheduler.add(a_request("other", prompt=range(50, 62), caller="b"), 0.0)
    scheduler.add(a_request("more", prompt=range(20, 32), caller="a"), 0.0)
    assert run(scheduler) == [("again", 8, 9), ("other", 0, 4)]
    assert run(scheduler) == [("more", 0, 8)], "one token was computed for this caller, four for b"


def test_nobody_saves_up_turns_by_staying_away() -> None:
    scheduler = a_scheduler(max_batch_tokens=8)
    add(scheduler, "a0", 64, caller="a")
    for _ in range(4):
        run(scheduler)
    add(scheduler, "b0", 32, caller="b")
    assert [names(scheduler) for _ in range(4)] == [["b0"], ["a0"], ["a0"], ["b0"]]


def test_who_leaves_and_comes_back_is_not_new_to_those_that_stayed() -> None:
    scheduler = a_scheduler(max_batch_tokens=8)
    add(scheduler, "a0", 64, caller="a")
    run(scheduler)
    add(scheduler, "b0", 8, caller="b")
    assert names(scheduler) == ["b0"]
    add(scheduler, "b1", 8, caller="b")
    assert [names(scheduler) for _ in range(3)] == [["a0"], ["b1"], ["a0"]]


def test_a_higher_priority_comes_first_even_in_the_middle_of_a_prompt() -> None:
    scheduler = a_scheduler(max_batch_tokens=8)
    add(scheduler, "slow", 24, caller="a")
    run(scheduler)
    add(scheduler, "urgent", 12, caller="a", priority=1)
    assert run(scheduler) == [("urgent", 0, 8)]
    assert run(scheduler) == [("urgent", 8, 12), ("slow", 8, 12)]


def test_whoever_has_started_goes_on_while_another_caller_waits_for_blocks() -> None:
    scheduler = a_scheduler(num_blocks=8, max_batch_tokens=8)
    add(scheduler, "a0", 24, caller="a")
    run(scheduler)
    add(scheduler, "b0", 12, caller="b")
    assert add(scheduler, "a1", 4, caller="a") is None
    assert run(scheduler) == [("a0", 8, 16)]
    assert run(scheduler) == [("a0", 16, 24)], "b is next and has no blocks; a1 does not pass it"
    assert run(scheduler) == []
    scheduler.release(a_request("a0").ref)
    assert run(scheduler) == [("b0", 0, 8)]


def test_no_prompt_waits_for_what_one_of_a_lower_priority_computes() -> None:
    scheduler = a_scheduler(max_batch_tokens=8)
    scheduler.add(a_request("low", prompt=range(16), caller="a"), 0.0)
    run(scheduler)
    scheduler.add(a_request("high", prompt=range(17), caller="b", priority=1), 0.0)
    step = scheduler.schedule()
    assert ranges(step) == [("high", 8, 16)], "the first blocks are a hit, the others come too late"
    scheduler.complete(step)


def test_the_caller_with_most_in_a_full_queue_gives_a_place_to_one_with_less() -> None:
    scheduler = a_scheduler(max_queued_requests=3)
    for index in range(3):
        assert add(scheduler, f"flood{index}", 4, caller="flood") is None
    with pytest.raises(Overloaded, match=r"queue is full \(3 requests\)"):
        add(scheduler, "flood3", 4, caller="flood")
    assert add(scheduler, "quiet0", 4, caller="quiet") == a_request("flood2").ref
    with pytest.raises(Overloaded):
        add(scheduler, "quiet1", 4, caller="quiet")
    assert names(scheduler) == ["flood0", "quiet0", "flood1"]


def test_a_full_queue_lets_a_higher_priority_in_and_no_lower_one() -> None:
    scheduler = a_scheduler(max_queued_requests=2)
    add(scheduler, "a0", 4, caller="a")
    add(scheduler, "b0", 4, caller="b")
    with pytest.raises(Overloaded):
        add(scheduler, "c0", 4, caller="c", priority=-1)
    assert add(scheduler, "c1", 4, caller="c", priority=1) == a_request("a0").ref
    assert names(scheduler) == ["c1", "b0"]
