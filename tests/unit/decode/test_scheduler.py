import pytest

from decode.scheduler import DecodeScheduler
from protocol.errors import ContextLengthExceeded, Overloaded
from tests.support.decode_books import BLOCK_TOKENS, TOKEN, a_ref, a_scheduler, running, step


def join(scheduler: DecodeScheduler, name: str, prompt_tokens: int, max_total: int = 64) -> None:
    scheduler.reserve(a_ref(name), prompt_tokens, max_total)
    scheduler.commit(a_ref(name), TOKEN)


def test_a_committed_request_steps_with_its_first_token_after_its_prompt() -> None:
    scheduler = a_scheduler()
    blocks = scheduler.reserve(a_ref("a"), 6, 20).blocks
    assert len(blocks) == 2
    assert step(scheduler).refs == [], "granted is not committed"
    scheduler.commit(a_ref("a"), 42)
    plan = step(scheduler)
    assert (plan.token_ids, plan.positions) == ([42], [6])
    assert plan.slots == [blocks[1] * BLOCK_TOKENS + 2]


def test_a_sequence_gets_a_block_when_it_crosses_a_boundary() -> None:
    scheduler = a_scheduler()
    join(scheduler, "a", 3)
    plans = [step(scheduler) for _ in range(3)]
    assert [plan.positions for plan in plans] == [[3], [4], [5]]
    assert [plan.grown_rows for plan in plans] == [[], [0], []]
    assert [plan.same_rows for plan in plans] == [False, True, True]
    assert plans[2].slots[0] == plans[1].slots[0] + 1
    assert scheduler.books().active == 2


def test_requests_join_and_leave_at_any_step() -> None:
    scheduler = a_scheduler()
    join(scheduler, "a", 3)
    assert running(step(scheduler)) == ["a"]
    join(scheduler, "b", 3)
    assert running(step(scheduler)) == ["a", "b"]
    scheduler.finish(a_ref("a"))
    plan = step(scheduler)
    assert running(plan) == ["b"]
    assert not plan.same_rows
    scheduler.finish(a_ref("b"))
    assert scheduler.books().free == 32


def test_beyond_the_batch_limit_sequences_wait_in_order() -> None:
    scheduler = a_scheduler(max_batch=2)
    for name in "abc":
        join(scheduler, name, 3)
    assert running(step(scheduler)) == ["a", "b"]
    assert scheduler.books().waiting_requests == 1
    scheduler.finish(a_ref("a"))
    assert running(step(scheduler)) == ["b", "c"]


def test_without_blocks_the_youngest_is_swapped_out_and_resumed_where_it_was() -> None:
    scheduler = a_scheduler(num_blocks=4)
    join(scheduler, "a", 7, max_total=16)
    join(scheduler, "b", 6, max_total=16)
    first = step(scheduler)
    b_blocks = tuple(first.tables[1].blocks)
    plan = step(scheduler)  # a crosses a boundary and no block is left
    assert running(plan) == ["a"]
    assert [(swap.ref, swap.blocks) for swap in plan.swap_out] == [(a_ref("b"), b_blocks)]
    assert scheduler.state(a_ref("b")) == "swapped"
    assert plan.slots[0] // BLOCK_TOKENS in b_blocks, "used in the very step that freed it"
    scheduler.finish(a_ref("a"))
    plan = step(scheduler)
    assert [(swap.ref, len(swap.blocks)) for swap in plan.swap_in] == [(a_ref("b"), 2)]
    assert (plan.positions, plan.token_ids) == ([7], [TOKEN])


def test_only_blocks_with_contents_are_swapped() -> None:
    scheduler = a_scheduler(num_blocks=4)
    join(scheduler, "a", 7, max_total=16)
    join(scheduler, "b", 4, max_total=16)
    plan = step(scheduler)  # b has a second block now, for the token of this step
    assert len(plan.tables[1].blocks) == 2
    plan = step(scheduler)
    assert [len(swap.blocks) for swap in plan.swap_out] == [2]
    scheduler = a_scheduler(num_blocks=3)
    join(scheduler, "a", 7, max_total=12)
    join(scheduler, "b", 4, max_total=12)
    plan = step(scheduler)  # b itself is the youngest, and has nowhere to put its token
    assert running(plan) == ["a"]
    assert [len(swap.blocks) for swap in plan.swap_out] == [1]


def test_swapped_sequences_resume_oldest_first() -> None:
    scheduler = a_scheduler(num_blocks=6)
    for name in "abc":
        join(scheduler, name, 7, max_total=24)
    step(scheduler)
    plan = step(scheduler)
    assert running(plan) == ["a", "b"]
    for _ in range(4):
        plan = step(scheduler)
    assert running(plan) == ["a"]
    assert [scheduler.state(a_ref(name)) for name in "bc"] == ["swapped", "swapped"]
    scheduler.finish(a_ref("a"))
    plan = step(scheduler)
    assert next(swap.ref.request_id for swap in plan.swap_in) == "b"
    assert running(plan)[0] == "b"


def test_nothing_new_is_granted_while_a_sequence_is_swapped_out() -> None:
    scheduler = a_scheduler(num_blocks=4)
    join(scheduler, "a", 7, max_total=16)
    join(scheduler, "b", 7, max_total=16)
    step(scheduler)
    step(scheduler)
    assert scheduler.books().free == 1
    with pytest.raises(Overloaded, match="1 KV blocks wanted, 0 can be reserved"):
        scheduler.reserve(a_ref("c"), 1, 4)


def test_headroom_is_kept_for_sequences_that_run_but_not_for_the_first() -> None:
    scheduler = a_scheduler(num_blocks=4, headroom_blocks=1)
    join(scheduler, "a", 4, max_total=16)
    assert scheduler.books().reservable == 2
    with pytest.raises(Overloaded):
        scheduler.reserve(a_ref("b"), 9, 16)
    scheduler.finish(a_ref("a"))
    assert len(scheduler.reserve(a_ref("b"), 15, 16).blocks) == 4


def test_a_request_that_could_outgrow_the_rank_is_refused_with_the_numbers() -> None:
    scheduler = a_scheduler(num_blocks=4)
    with pytest.raises(ContextLengthExceeded, match=r"may reach 17 tokens.*room for 16"):
        scheduler.reserve(a_ref("a"), 3, 17)


def test_an_aborted_grant_is_out_of_use_until_it_is_proven_quiet() -> None:
    scheduler = a_scheduler(num_blocks=4)
    scheduler.reserve(a_ref("a"), 12, 16)
    assert scheduler.cancel(a_ref("a")) == "granted"
    books = scheduler.books()
    assert (books.quarantined, books.granted, books.free) == (3, 0, 1)
    with pytest.raises(Overloaded):
        scheduler.reserve(a_ref("b"), 8, 16)
    assert scheduler.quiet(a_ref("a"))
    assert scheduler.books().free == 4
    assert not scheduler.quiet(a_ref("a")), "proof that comes twice changes nothing"


def test_only_grants_are_quarantined() -> None:
    scheduler = a_scheduler()
    join(scheduler, "a", 3)
    assert not scheduler.quarantine(a_ref("a"))
    assert not scheduler.quarantine(a_ref("unknown"))
    assert scheduler.books().quarantined == 0


@pytest.mark.parametrize("state", ["active", "swapped", None], ids=str)
def test_cancelling_frees_everything_whatever_the_state(state: str | None) -> None:
    scheduler = a_scheduler(num_blocks=4)
    join(scheduler, "a", 7, max_total=16)
    join(scheduler, "b", 7, max_total=16)
    step(scheduler)
    step(scheduler)
    victim = {"active": "a", "swapped": "b", None: "unknown"}[state]
    assert scheduler.cancel(a_ref(victim)) == state
    assert scheduler.state(a_ref(victim)) is None
    for name in "ab":
        scheduler.cancel(a_ref(name))
    assert scheduler.books().free == 4
    assert step(scheduler).refs == []


def test_a_cancelled_row_is_skipped_when_its_step_advances() -> None:
    scheduler = a_scheduler()
    join(scheduler, "a", 3)
    join(scheduler, "b", 3)
    plan = scheduler.schedule()
    scheduler.cancel(a_ref("a"))
    scheduler.advance(plan, [1, 2])
    plan = scheduler.schedule()
    assert (running(plan), plan.token_ids) == (["b"], [2])


def test_a_batch_limit_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="max_batch must be positive, got 0"):
        a_scheduler(max_batch=0)
