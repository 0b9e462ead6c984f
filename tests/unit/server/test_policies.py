"""Where requests go, given what is known."""

import pytest

from protocol.errors import ContextLengthExceeded
from protocol.holdings import Holding
from protocol.ids import RequestId, WorkerId, WorkerRef
from protocol.workers import WorkerLoad, WorkerState
from server.policies import Demand, Work, decode_order, prefill_order
from server.unreported import UnreportedWork
from tests.support.arithmetic import MODEL, a_worker_info


def a_prefill(name: str, *, queued_tokens: int = 0) -> WorkerState:
    load = WorkerLoad(queued_tokens=queued_tokens)
    return WorkerState(info=a_worker_info(name, "prefill"), load=load)


def a_rank(
    name: str, *, running: int = 0, free_blocks: int = 100, draining: bool = False
) -> WorkerState:
    load = WorkerLoad(running_requests=running, free_blocks=free_blocks, draining=draining)
    return WorkerState(info=a_worker_info(name, "decode", num_blocks=100), load=load)


def a_demand(
    prompt_tokens: int = 64,
    *,
    hit_tokens: dict[WorkerRef, int] | None = None,
    request_id: str = "r",
    model: str = MODEL,
) -> Demand:
    return Demand(
        request_id=RequestId(request_id),
        model=model,
        prompt_tokens=prompt_tokens,
        hit_tokens=hit_tokens or {},
    )


def names(order: list[WorkerState]) -> list[str]:
    return [state.info.ref.worker_id for state in order]


def test_prefill_goes_where_the_prefix_is() -> None:
    a, b = a_prefill("a"), a_prefill("b")
    demand = a_demand(1000, hit_tokens={b.info.ref: 900})
    assert names(prefill_order([a, b], demand, unreported={})) == ["b", "a"]


def test_a_hit_never_attracts_more_than_it_saves() -> None:
    idle, busy = a_prefill("idle"), a_prefill("busy", queued_tokens=901)
    demand = a_demand(1000, hit_tokens={busy.info.ref: 900})
    assert names(prefill_order([busy, idle], demand, unreported={})) == ["idle", "busy"]


def test_the_last_prompt_token_is_computed_even_on_a_full_hit() -> None:
    whole, none = a_prefill("whole", queued_tokens=63), a_prefill("none")
    demand = a_demand(64, hit_tokens={whole.info.ref: 64})
    # 63 queued and 1 of its own equal 64 of its own: a tie, and not 63 against 64.
    first = {
        names(prefill_order([whole, none], a, unreported={}))[0]
        for a in (
            a_demand(64, hit_tokens=dict(demand.hit_tokens), request_id=str(n)) for n in range(32)
        )
    }
    assert first == {"whole", "none"}


def test_decode_goes_to_the_rank_with_fewest_requests_then_most_room() -> None:
    busy = a_rank("busy", running=3)
    tight = a_rank("tight", running=1, free_blocks=10)
    roomy = a_rank("roomy", running=1, free_blocks=20)
    order = decode_order([busy, tight, roomy], a_demand(), unreported={})
    assert names(order) == ["roomy", "tight", "busy"]


def test_ranks_without_room_are_not_asked() -> None:
    order = decode_order([a_rank("full", free_blocks=4)], a_demand(65), unreported={})
    assert order == []  # 65 tokens take 5 blocks


def test_a_prompt_that_fits_nowhere_says_how_many_blocks_are_missing() -> None:
    with pytest.raises(ContextLengthExceeded, match="1 more KV blocks"):
        decode_order([a_rank("a", free_blocks=0)], a_demand(1601), unreported={})


def test_draining_workers_and_other_models_are_never_asked() -> None:
    ranks = [a_rank("a", draining=True), a_rank("b")]
    assert names(decode_order(ranks, a_demand(), unreported={})) == ["b"]
    assert decode_order(ranks, a_demand(model="another"), unreported={}) == []


def test_failed_workers_are_avoided_while_there_are_others() -> None:
    a, b = a_rank("a"), a_rank("b", running=50)
    assert names(decode_order([a, b], a_demand(), unreported={}, avoid={WorkerId("a")})) == ["b"]
    assert names(decode_order([a], a_demand(), unreported={}, avoid={WorkerId("a")})) == ["a"]


def test_gateways_with_the_same_view_do_not_all_choose_the_same_rank() -> None:
    ranks = [a_rank(name) for name in "abcd"]
    demands = [a_demand(request_id=f"r{n}") for n in range(64)]
    chosen = {names(decode_order(ranks, demand, unreported={}))[0] for demand in demands}
    assert chosen == set("abcd")


def test_work_sent_since_the_last_report_counts_until_the_next() -> None:
    a, b = a_rank("a"), a_rank("b", running=1)
    ledger = UnreportedWork()
    for _ in range(2):
        ledger.begun(a.info.ref, Work(requests=1, blocks=5))
    assert names(decode_order([a, b], a_demand(), unreported=ledger.since_report)) == ["b", "a"]
    ledger.reported(a.info.ref)
    assert names(decode_order([a, b], a_demand(), unreported=ledger.since_report)) == ["a", "b"]


def test_work_that_ended_since_the_last_report_makes_room() -> None:
    full = a_rank("full", running=1, free_blocks=0)
    ledger = UnreportedWork()
    ledger.ended(full.info.ref, Work(requests=1, blocks=5))
    assert names(decode_order([full], a_demand(), unreported=ledger.since_report)) == ["full"]


def a_crowded_rank(name: str, *, spare_blocks: int = 0) -> WorkerState:
    """``many`` holds all of it, and has requests swapped out."""
    held = Holding(caller="many", priority=0, blocks=100, yielding=90, swapped_requests=2)
    load = WorkerLoad(spare_blocks=spare_blocks, total_blocks=100, holdings=(held,))
    return WorkerState(info=a_worker_info(name, "decode", num_blocks=100), load=load)


def order_for(
    caller: str, ranks: list[WorkerState], prompt_tokens: int = 64, *, behind: bool = False
) -> list[str]:
    demand = Demand(
        request_id=RequestId("r"), model=MODEL, prompt_tokens=prompt_tokens, caller=caller
    )
    return names(decode_order(ranks, demand, unreported={}, behind=behind))


def test_a_full_rank_is_asked_for_a_caller_for_whom_others_must_give_way() -> None:
    assert order_for("few", [a_crowded_rank("full")]) == ["full"]
    assert order_for("few", [a_crowded_rank("full")], behind=True) == ["full"]
    assert order_for("many", [a_crowded_rank("full", spare_blocks=9)]) == []
    assert order_for("few", [a_crowded_rank("full")], 51 * 16) == [], "its part is 50 blocks"


def test_nobody_has_to_give_way_while_there_is_room_elsewhere() -> None:
    assert order_for("few", [a_crowded_rank("full"), a_rank("roomy")]) == ["roomy"]


def test_what_is_free_is_for_whoever_waits_before() -> None:
    assert order_for("few", [a_rank("roomy")], behind=True) == []


def test_reservations_since_the_last_report_count_where_others_give_way() -> None:
    rank = a_crowded_rank("full")
    demand = Demand(request_id=RequestId("r"), model=MODEL, prompt_tokens=160, caller="few")
    for blocks, order in ((40, ["full"]), (41, [])):
        unreported = {rank.info.ref: Work(blocks=blocks)}
        assert names(decode_order([rank], demand, unreported=unreported)) == order
