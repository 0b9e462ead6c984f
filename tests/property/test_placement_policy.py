"""Placement, for any cluster: only able workers, each once, and none better left out."""

from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ContextLengthExceeded
from protocol.ids import RequestId, WorkerRef
from protocol.workers import WorkerLoad, WorkerState
from server.policies import Demand, Work, decode_order, prefill_order, uncached_tokens
from tests.support.arithmetic import LAYOUT, MODEL, a_worker_info

loads = st.builds(
    WorkerLoad,
    draining=st.booleans(),
    queued_requests=st.integers(0, 9),
    running_requests=st.integers(0, 9),
    queued_tokens=st.integers(0, 5000),
    free_blocks=st.integers(0, 100),
)
work = st.builds(
    Work, requests=st.integers(-5, 5), tokens=st.integers(-500, 500), blocks=st.integers(-9, 9)
)
prompts = st.integers(1, 1500)


@st.composite
def workers(draw: st.DrawFn, role: str) -> list[WorkerState]:
    states = []
    for index, load in enumerate(draw(st.lists(loads, max_size=6))):
        model = draw(st.sampled_from([MODEL, MODEL, "another"]))
        assert role in ("prefill", "decode")
        info = a_worker_info(
            f"{role}-{index}",
            "prefill" if role == "prefill" else "decode",
            model=model,
            num_blocks=100,
        )
        states.append(WorkerState(info=info, load=load))
    return states


def able(states: list[WorkerState]) -> list[WorkerState]:
    return [s for s in states if s.info.model == MODEL and not s.load.draining]


@given(states=workers("prefill"), prompt=prompts, data=st.data())
def test_prefill_candidates_are_ordered_by_the_tokens_left_to_compute(
    states: list[WorkerState], prompt: int, data: st.DataObject
) -> None:
    hits = {s.info.ref: data.draw(st.integers(0, 2000)) for s in states}
    unreported = {s.info.ref: data.draw(work) for s in states}
    demand = Demand(request_id=RequestId("r"), model=MODEL, prompt_tokens=prompt, hit_tokens=hits)
    order = prefill_order(states, demand, unreported=unreported)

    def cost(state: WorkerState) -> int:
        ref = state.info.ref
        return state.load.queued_tokens + unreported[ref].tokens + uncached_tokens(ref, demand)

    assert sorted(map(id, order)) == sorted(map(id, able(states)))
    assert [cost(s) for s in order] == sorted(cost(s) for s in order)
    assert all(1 <= uncached_tokens(s.info.ref, demand) <= prompt for s in states)


@given(states=workers("decode"), prompt=prompts, data=st.data())
def test_decode_candidates_have_room_and_the_least_loaded_is_first(
    states: list[WorkerState], prompt: int, data: st.DataObject
) -> None:
    unreported: dict[WorkerRef, Work] = {s.info.ref: data.draw(work) for s in states}
    avoid = {s.info.ref.worker_id for s in states if data.draw(st.booleans())}
    demand = Demand(request_id=RequestId("r"), model=MODEL, prompt_tokens=prompt)
    order = decode_order(states, demand, unreported=unreported, avoid=avoid)

    def free(state: WorkerState) -> int:
        return state.load.free_blocks - unreported[state.info.ref].blocks

    candidates = [s for s in able(states) if s.info.ref.worker_id not in avoid] or able(states)
    roomy = [s for s in candidates if free(s) >= LAYOUT.blocks_for(prompt)]
    assert sorted(map(id, order)) == sorted(map(id, roomy))
    if order:
        requests = [
            s.load.running_requests + s.load.queued_requests + unreported[s.info.ref].requests
            for s in order
        ]
        assert requests == sorted(requests)


@given(states=workers("decode"), extra=st.integers(0, 5000))
def test_a_prompt_that_no_rank_could_ever_hold_is_refused(
    states: list[WorkerState], extra: int
) -> None:
    demand = Demand(request_id=RequestId("r"), model=MODEL, prompt_tokens=1601 + extra)
    try:
        order = decode_order(states, demand, unreported={})
    except ContextLengthExceeded:
        assert able(states)
    else:
        assert order == []
        assert not able(states)
