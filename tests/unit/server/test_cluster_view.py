"""When a membership can serve, and why not."""

import msgspec
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
        "a rank drains",
        "other model",
    ],
)
def test_what_is_missing_is_named(workers: list[WorkerState], reason: str) -> None:
    view = view_of(workers)
    assert view.lack(MODEL) == reason
    assert view.pairs() == []


def of_four(
    rank: int, *, epoch: int = 1, absent: tuple[int, ...] = (), draining: bool = False
) -> WorkerState:
    """A rank of a group that goes on with three of four."""
    state = a_rank(rank, 4, epoch=epoch, draining=draining)
    info = msgspec.structs.replace(state.info, absent=absent, spare_ranks=1)
    return msgspec.structs.replace(state, info=info)


def taking(*ranks: WorkerState) -> list[int]:
    return [state.info.rank for state in view_of([a_prefill(), *ranks]).decode]


def test_the_others_take_requests_while_a_lost_rank_is_left_behind() -> None:
    lost = [of_four(rank) for rank in (0, 1, 3)]
    assert taking(*lost) == [0, 1, 3]
    left_behind = of_four(0, epoch=2, absent=(2,))
    assert taking(left_behind, lost[1], of_four(2), lost[2]) == [0, 1, 3]
    met = [of_four(rank, epoch=2, absent=(2,)) for rank in (0, 1, 3)]
    assert taking(*met) == [0, 1, 3]
    assert view_of(met).groups[0].complete


def test_a_group_without_too_many_ranks_takes_nothing() -> None:
    assert taking(of_four(0), of_four(3)) == []
    assert taking(*(of_four(rank, epoch=2, absent=(2,)) for rank in (0, 1))) == []


def test_a_rank_that_drains_takes_nothing_and_the_others_go_on_if_they_are_enough() -> None:
    assert taking(*(of_four(rank, draining=rank == 0) for rank in range(4))) == [1, 2, 3]
    assert taking(*(of_four(rank, draining=rank < 2) for rank in range(4))) == []


def test_models_are_known_before_they_can_be_served() -> None:
    assert view_of([a_rank(0, 2)]).models() == [MODEL]


def test_a_new_scheduler_that_does_not_mention_a_worker_has_not_lost_it() -> None:
    known = [a_prefill("prefill-0"), a_prefill("prefill-1")]
    restarted = a_prefill("prefill-1")
    assert keep_missing(known, [restarted]) == (restarted, known[0])
