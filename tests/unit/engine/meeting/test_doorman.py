"""Who is received: not by a rank that is stuck, but by one that waits for others."""

import math
import socket
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions

from engine.collectives import Alone, Awaited, ExpertGroup, RankConnection, StepGroup
from engine.meeting.doorman import Doorman
from engine.meeting.visit import answers
from protocol.errors import WorkerLost

GROUP = "decode-0:1"
UNSEEN_S = 0.0  # the engine thread has always been unseen for that long
LONG_S = 3600.0


class Listening(Alone):
    """Notes whether the rank receives visitors while it waits for others, and loses them."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.received: list[bool] = []

    def wait(self) -> bool:
        self.received.append(answers(self._address, GROUP))
        raise RuntimeError("nothing came")

    def alltoall_base(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        opts: dist.AllToAllOptions,
    ) -> Awaited:
        return self

    def _allgather_base(self, output: Tensor, input: Tensor, _: AllgatherOptions) -> Awaited:
        return self

    def _reduce_scatter_base(
        self, output: Tensor, input: Tensor, _: dist.ReduceScatterOptions
    ) -> Awaited:
        return self

    def gather(
        self,
        output_tensors: list[list[Tensor]],
        input_tensors: list[Tensor],
        opts: dist.GatherOptions,
    ) -> Awaited:
        return self

    def broadcast(self, tensors: list[Tensor], opts: dist.BroadcastOptions) -> Awaited:
        return self


class Rank:
    def __init__(self, stuck_s: float) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self.experts = ExpertGroup(seat=0, num_seats=2, device=torch.device("cpu"))
        self.doorman = Doorman(
            listener,
            group=GROUP,
            role="decode",
            rank=0,
            num_ranks=2,
            terms={},
            key=b"",
            stuck_s=stuck_s,
            waited_until=lambda: self.experts.waited_until,
        )
        self.backend = Listening(self.address)
        self.group = StepGroup(
            self.experts,
            epoch=1,
            members=(0, 1),
            connection=RankConnection(
                control=self.backend, experts=self.backend, store=None, rows="none"
            ),
        )


@pytest.fixture
def stuck() -> Iterator[Rank]:
    rank = Rank(UNSEEN_S)
    yield rank
    rank.doorman.close()


def test_a_rank_that_is_at_work_receives_visitors() -> None:
    rank = Rank(LONG_S)
    assert answers(rank.address, GROUP)
    rank.doorman.close()
    assert not answers(rank.address, GROUP)


def test_a_rank_whose_thread_was_not_seen_for_long_receives_nobody(stuck: Rank) -> None:
    assert not answers(stuck.address, GROUP)


ROWS = torch.zeros(2, 1)
WAITS: dict[str, Callable[[Rank], object]] = {
    "step rows": lambda rank: rank.group.exchange([1]),
    "expert rows": lambda rank: rank.experts.exchange_rows(ROWS, [1, 1], [1, 1]).wait(),
    "gathered rows": lambda rank: rank.experts.gather_rows(ROWS, ROWS).wait(),
    "summed rows": lambda rank: rank.experts.sum_rows(ROWS, ROWS).wait(),
    "plans": lambda rank: rank.group.begin_gather([1], root=0).wait(),
    "what was planned": lambda rank: rank.group.begin_broadcast([1], root=0).wait(),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=list(WAITS))
def test_it_receives_those_who_notice_a_loss_before_it_does(
    stuck: Rank, wait: Callable[[Rank], object]
) -> None:
    with pytest.raises(WorkerLost, match="nothing came"):
        wait(stuck)

    assert stuck.backend.received == [True]
    assert not answers(stuck.address, GROUP)  # the wait is over, and it is stuck as before


def test_a_rank_that_has_just_noticed_a_loss_receives_visitors() -> None:
    rank = Rank(LONG_S)
    rank.doorman._seen_at = -math.inf
    assert not answers(rank.address, GROUP)

    with pytest.raises(WorkerLost, match="nothing came"):
        rank.group.exchange([1])

    assert answers(rank.address, GROUP)
    rank.doorman.close()
