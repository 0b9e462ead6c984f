import pytest

from prefill.scheduler import Chunk, PrefillScheduler
from protocol.errors import ContextLengthExceeded, Overloaded
from protocol.ids import AttemptRef
from tests.support.generation import a_request
from tests.support.prefill_books import a_scheduler, ranges, run


def add(
    scheduler: PrefillScheduler,
    name: str,
    num_tokens: int,
    *,
    first: int | None = None,
    namespace: str = "default",
    deadline_s: float | None = None,
) -> AttemptRef:
    """Queue a prompt; prompts share a prefix exactly when ``first`` is equal."""
    start = first if first is not None else sum(map(ord, name)) * 1000
    request = a_request(name, prompt=range(start, start + num_tokens), namespace=namespace)
    scheduler.add(request, 0.0, deadline_s)
    return request.ref


def only_chunk(scheduler: PrefillScheduler) -> Chunk:
    step = scheduler.schedule()
    scheduler.complete(step)
    (chunk,) = step.chunks
    return chunk


def test_several_prompts_share_a_step() -> None:
    scheduler = a_scheduler()
    add(scheduler, "a", 5)
    add(scheduler, "b", 6)
    assert run(scheduler) == [("a", 0, 5), ("b", 0, 6)]


def test_a_long_prompt_is_cut_at_block_boundaries_and_the_rest_of_a_step_is_used() -> None:
    scheduler = a_scheduler(max_batch_tokens=18)
    add(scheduler, "a", 21)
    add(scheduler, "b", 20)
    assert run(scheduler) == [("a", 0, 16)]
    assert run(scheduler) == [("a", 16, 21), ("b", 0, 12)]
    assert run(scheduler) == [("b", 12, 20)]


def test_a_short_prompt_fills_what_a_longer_one_before_it_cannot_use() -> None:
    scheduler = a_scheduler(max_batch_tokens=16)
    add(scheduler, "a", 13)
    add(scheduler, "b", 40)
    add(scheduler, "c", 3)
    assert run(scheduler) == [("a", 0, 13), ("c", 0, 3)]
    assert run(scheduler) == [("b", 0, 16)]


def test_a_step_has_at_most_so_many_sequences() -> None:
    scheduler = a_scheduler(max_batch_sequences=2)
    for name in "abc":
        add(scheduler, name, 2)
    assert run(scheduler) == [("a", 0, 2), ("b", 0, 2)]
    assert run(scheduler) == [("c", 0, 2)]


def test_each_chunk_names_the_blocks_that_become_final_once() -> None:
    scheduler = a_scheduler(max_batch_tokens=8)
    add(scheduler, "a", 18)
    chunks = [only_chunk(scheduler) for _ in range(3)]
    assert [(chunk.first_block, len(chunk.source_blocks)) for chunk in chunks] == [
        (0, 2),
        (2, 2),
        (4, 1),  # the partial tail, final with the prompt
    ]
    assert [chunk.final for chunk in chunks] == [False, False, True]
    assert [block for chunk in chunks for block in chunk.source_blocks] == chunks[0].table.blocks


def test_a_prefix_hit_is_not_computed_but_pushed_with_the_first_chunk() -> None:
    scheduler = a_scheduler()
    add(scheduler, "a", 10, first=0)
    run(scheduler)
    ref = add(scheduler, "b", 15, first=0)
    chunk = only_chunk(scheduler)
    assert (chunk.start, chunk.stop) == (8, 15)
    assert chunk.token_ids == tuple(range(8, 15))
    assert (chunk.first_block, len(chunk.source_blocks), chunk.hit_blocks) == (0, 4, 2)
    assert scheduler.cached_tokens(ref) == 8
    assert scheduler.books().prefix_hit_tokens == 8


def test_a_prompt_that_is_wholly_cached_computes_its_last_block_again() -> None:
    scheduler = a_scheduler()
    add(scheduler, "a", 8, first=0)
    run(scheduler)
    add(scheduler, "b", 8, first=0)
    assert run(scheduler) == [("b", 4, 8)]


def test_hits_do_not_cross_namespaces() -> None:
    scheduler = a_scheduler()
    add(scheduler, "a", 8, first=0)
    run(scheduler)
    add(scheduler, "b", 8, first=0, namespace="other")
    assert run(scheduler) == [("b", 0, 8)]


def test_choices_of_one_prompt_wait_for_the_first_and_then_hit() -> None:
    scheduler = a_scheduler(max_batch_tokens=16)
    add(scheduler, "a", 20, first=0)
    add(scheduler, "b", 20, first=0)
    add(scheduler, "c", 4)
    assert run(scheduler) == [("a", 0, 16)]
    assert run(scheduler) == [("a", 16, 20), ("b", 16, 20), ("c", 0, 4)]


def test_a_prompt_waits_no_longer_for_one_that_was_cancelled() -> None:
    scheduler = a_scheduler(max_batch_tokens=8)
    first = add(scheduler, "a", 20, first=0)
    add(scheduler, "b", 20, first=0)
    assert run(scheduler) == [("a", 0, 8)]
    assert scheduler.cancel(first)
    assert run(scheduler) == [("b", 8, 16)]


def test_a_prompt_without_blocks_waits_and_nobody_overtakes_it() -> None:
    scheduler = a_scheduler(num_blocks=4)
    first = add(scheduler, "a", 12)
    add(scheduler, "b", 8)
    add(scheduler, "c", 2)
    assert run(scheduler) == [("a", 0, 12)]
    assert run(scheduler) == [], "c would fit, but b came first"
    scheduler.release(first)
    assert run(scheduler) == [("b", 0, 8), ("c", 0, 2)]


def test_a_prompt_that_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler = a_scheduler(num_blocks=4)
    with pytest.raises(ContextLengthExceeded, match=r"17 tokens.*room for 16"):
        add(scheduler, "a", 17)


def test_a_full_queue_refuses() -> None:
    scheduler = a_scheduler(max_queued_requests=1)
    add(scheduler, "a", 1)
    with pytest.raises(Overloaded, match="queue is full"):
        add(scheduler, "b", 1)


def test_computed_blocks_stay_pinned_until_released_and_are_cached_then() -> None:
    scheduler = a_scheduler(num_blocks=4)
    ref = add(scheduler, "a", 14)
    run(scheduler)
    assert scheduler.books().pinned == 1
    scheduler.release(ref)
    scheduler.release(ref)
    assert ref not in scheduler
    add(scheduler, "b", 16)
    assert run(scheduler) == [("b", 0, 16)], "the cached blocks were evicted for it"


def test_cancelling_a_waiting_prompt_holds_nothing() -> None:
    scheduler = a_scheduler()
    ref = add(scheduler, "a", 3)
    assert not scheduler.cancel(ref)
    assert run(scheduler) == []
    assert not scheduler.cancel(ref), "unknown now"


def test_blocks_cancelled_and_released_within_a_step_are_free_only_after_it() -> None:
    scheduler = a_scheduler(num_blocks=4)
    ref = add(scheduler, "a", 8)
    add(scheduler, "b", 16)
    step = scheduler.schedule()
    assert scheduler.cancel(ref)
    scheduler.release(ref)
    assert scheduler.books().pinned == 1
    scheduler.complete(step)
    assert scheduler.books().pinned == 0
    assert run(scheduler) == [("b", 0, 16)]


def test_chunks_of_a_prompt_follow_one_another_before_the_first_is_complete() -> None:
    scheduler = a_scheduler(max_batch_tokens=8)
    ref = add(scheduler, "a", 20)
    steps = [scheduler.schedule() for _ in range(4)]
    assert [ranges(step) for step in steps] == [[("a", 0, 8)], [("a", 8, 16)], [("a", 16, 20)], []]
    assert scheduler.books().queued_tokens == 20
    for step, queued in zip(steps[:3], (12, 4, 0), strict=True):
        assert scheduler.books().computing == 1
        scheduler.complete(step)
        assert scheduler.books().queued_tokens == queued
    assert scheduler.books().pinned == 1
    scheduler.release(ref)
    scheduler.check()


def test_blocks_are_free_only_after_the_last_of_the_steps_that_write_into_them() -> None:
    scheduler = a_scheduler(num_blocks=4, max_batch_tokens=8)
    ref = add(scheduler, "a", 16)
    first, second = scheduler.schedule(), scheduler.schedule()
    scheduler.cancel(ref)
    scheduler.release(ref)
    add(scheduler, "b", 16)
    scheduler.complete(first)
    assert ranges(scheduler.schedule()) == []
    scheduler.complete(second)
    assert run(scheduler) == [("b", 0, 8)]


def test_a_prompt_with_the_same_beginning_waits_until_all_stages_have_it() -> None:
    scheduler = a_scheduler(max_batch_tokens=8)
    add(scheduler, "a", 16, first=0)
    add(scheduler, "b", 17, first=0)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert ranges(scheduler.schedule()) == []
    scheduler.complete(first)
    assert ranges(scheduler.schedule()) == []
    scheduler.complete(second)
    assert run(scheduler) == [("b", 16, 17)]


def test_what_was_cancelled_within_a_step_is_not_cached() -> None:
    scheduler = a_scheduler()
    ref = add(scheduler, "a", 8, first=0)
    step = scheduler.schedule()
    scheduler.cancel(ref)
    scheduler.complete(step)
    add(scheduler, "b", 8, first=0)
    assert run(scheduler) == [("b", 0, 8)]


def test_a_rejected_prompt_leaves_nothing_in_the_prefix_cache() -> None:
    scheduler = a_scheduler(max_batch_tokens=8)
    ref = add(scheduler, "a", 20, first=0)
    run(scheduler)
    assert scheduler.reject(ref)
    scheduler.release(ref)
    scheduler.check()
    add(scheduler, "b", 20, first=0)
    assert run(scheduler) == [("b", 0, 8)]


def test_prompts_expire_at_their_deadline_unless_computed() -> None:
    scheduler = a_scheduler(max_batch_tokens=8)
    done = add(scheduler, "a", 4, deadline_s=5.0)
    run(scheduler)
    late = add(scheduler, "b", 20, deadline_s=5.0)
    run(scheduler)
    queued = add(scheduler, "c", 4, deadline_s=5.0)
    add(scheduler, "d", 4, deadline_s=6.0)
    assert scheduler.expire(4.9) == []
    assert set(scheduler.expire(5.0)) == {queued, late}
    assert scheduler.expire(5.0) == []
    assert done in scheduler
    scheduler.release(late)
    scheduler.release(queued)
    assert run(scheduler) == [("d", 0, 4)]


def test_the_books_count_what_is_still_to_compute() -> None:
    scheduler = a_scheduler(max_batch_tokens=8)
    add(scheduler, "a", 20)
    add(scheduler, "b", 3)
    run(scheduler)
    books = scheduler.books()
    assert (books.waiting, books.computing, books.queued_tokens) == (1, 1, 15)
    assert books.prompt_tokens == 20


def test_a_budget_below_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_batch_tokens must be at least block_tokens \(4\)"):
        a_scheduler(max_batch_tokens=3)
