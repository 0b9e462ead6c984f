"""When a membership can serve, and why not."""

import pytest

from protocol.workers import WorkerLoad, WorkerState
from server.cluster_view import keep_missing, view_of
from tests.support.arithmetic import MODEL, a_worker_info


def a_prefill(name: str = "prefill-0", *, draining: bool = False) -> WorkerState:
    return WorkerState(info=a_worker_info(name, "prefill"), load=WorkerLoad(draining=draining))


def a_rank(
    rank: int, world_size: int, *, epoch: int = 1, draining: bool = False, model: str = MODEL
) -> WorkerState:
    info = a_worker_info(
        f"decode-0/{rank}",
        "decode",
        group_id="decode-0",
        rank=rank,
        world_size=world_size,
        epoch=epoch,
        model=model,
    )
    return WorkerState(info=info, load=WorkerLoad(draining=draining))


def test_a_group_serves_when_all_its_ranks_are_members() -> None:
    view = view_of([a_rank(1, 2), a_prefill(), a_rank(0, 2)])
    assert view.lack(MODEL) is None
    assert [state.info.rank for state in view.decode] == [0, 1]
    assert len(view.pairs()) == 1


@pytest.mark.parametrize(
    ("workers", "reason"),
    [
        ([a_rank(0, 1)], "no prefill worker"),
        ([a_prefill(draining=True), a_rank(0, 1)], "no prefill worker"),
        ([a_prefill()], "no decode worker"),
        (
            [a_prefill(), a_rank(0, 4), a_rank(2, 4)],
            "no decode worker: waiting for 2 of 4 ranks of decode-0",
        ),
        (
            [a_prefill(), a_rank(0, 2, epoch=1), a_rank(1, 2, epoch=2)],
            "no decode worker: waiting for 1 of 2 ranks of decode-0",
        ),
        (
            [a_prefill(), a_rank(0, 2), a_rank(1, 2, draining=True)],
            "no decode worker: draining",
        ),
        ([a_prefill(), a_rank(0, 1, model="another")], "no decode worker"),
    ],
    ids=[
        "no prefill",
        "prefill drains",
        "no decode",
        "ranks missing",
        "epochs differ",
        "a rank drains",
        "other model",
    ],
)
def test_what_is_missing_is_named(workers: list[WorkerState], reason: str) -> None:
    view = view_of(workers)
    assert view.lack(MODEL) == reason
    assert view.pairs() == []


def test_models_are_known_before_they_can_be_served() -> None:
    assert view_of([a_rank(0, 2)]).models() == [MODEL]


def test_a_new_scheduler_that_does_not_mention_a_worker_has_not_lost_it() -> None:
    known = [a_prefill("prefill-0"), a_prefill("prefill-1")]
    restarted = a_prefill("prefill-1")
    assert keep_missing(known, [restarted]) == (restarted, known[0])
