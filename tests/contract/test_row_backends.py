"""Whatever carries rows between ranks, it carries these alike: gloo, and memory that they share."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions

from engine.backends import RowsChoice
from engine.collectives import Backend, ExpertGroup, StepGroup
from engine.rendezvous import Rendezvous
from protocol.errors import WorkerLost
from tests.support.ranks import Parent, RankProcess, free_address, run_ranks, start_rank

pytestmark = pytest.mark.multirank
STEP_TIMEOUT_S = 2.0


@pytest.fixture(params=["gloo", "shared_memory"])
def rows(request: pytest.FixtureRequest) -> RowsChoice:
    chosen: RowsChoice = request.param
    return chosen


def payload(source: int, target: int, rows: int, width: int) -> Tensor:
    """What ``source`` sends ``target``: every byte depends on all of it."""
    line = torch.arange(rows * width, dtype=torch.int64) * 7 + 31 * source + 101 * target
    return (line % 251).to(torch.uint8).view(rows, width)


def counts_of(source: int, size: int, most: int) -> list[int]:
    """Ragged, with zeros among them."""
    return [(source * 5 + target * 3) % (most + 1) for target in range(size)]


def exchanged(group: StepGroup, width: int, most: int) -> Tensor:
    """This rank's rows of one exchange; asserts that each is what its source sent."""
    me, size = group.rank, group.world_size
    sent = counts_of(me, size, most)
    received = [counts_of(source, size, most)[me] for source in range(size)]
    rows = torch.cat([payload(me, target, count, width) for target, count in enumerate(sent)])
    arrived = group.expert_group.exchange_rows(rows, sent, received).wait()
    wanted = [payload(source, me, count, width) for source, count in enumerate(received)]
    assert torch.equal(arrived, torch.cat(wanted))
    return arrived


def exchange_of_sizes(group: StepGroup, widths: Sequence[int], most: int) -> list[int]:
    return [exchanged(group, width, most).nbytes for width in widths]


@pytest.mark.parametrize("size", [2, 5])
def test_ragged_rows_arrive_whatever_their_number_and_width(rows: RowsChoice, size: int) -> None:
    widths = (1, 7, 64, 1000, 65537)
    got = run_ranks(exchange_of_sizes, size, widths, 6, rows=rows)
    for me, bytes_of_width in enumerate(got):
        arrived = sum(counts_of(source, size, 6)[me] for source in range(size))
        assert bytes_of_width == [arrived * width for width in widths]


def test_tens_of_megabytes_pass(rows: RowsChoice) -> None:
    assert max(run_ranks(exchange_of_sizes, 2, (12_000_000,), 3, rows=rows)) > [12_000_000]


def no_rows_at_all(group: StepGroup) -> tuple[int, ...]:
    zeros = [0] * group.world_size
    empty = torch.empty(0, 24, dtype=torch.uint8)
    shape = group.expert_group.exchange_rows(empty, zeros, zeros).wait().shape
    group.exchange([1])
    return tuple(shape)


def test_an_exchange_without_a_row_keeps_its_shape(rows: RowsChoice) -> None:
    assert run_ranks(no_rows_at_all, 3, rows=rows) == [(0, 24)] * 3


def wait_out_of_the_way(group: StepGroup) -> list[list[tuple[int, ...]]]:
    """Numbers and two exchanges of rows under way at once, larger than any buffer between."""
    me, size, experts = group.rank, group.world_size, group.expert_group
    counts = [3] * size
    told: list[list[tuple[int, ...]]] = []
    for turn in range(4):
        gathered = group.begin_gather((turn, me), root=1)
        plan = group.begin_broadcast((turn, me), root=2)
        first = torch.cat([payload(me, target, 3, 200_000) for target in range(size)])
        second = torch.cat([payload(me, target, 3, 33) for target in range(size)])
        on_the_way = experts.exchange_rows(first, counts, counts)
        also = experts.exchange_rows(second, counts, counts)
        rows = group.exchange((turn, 10 + me))
        assert rows == [(turn, 10 + rank) for rank in range(size)]
        for pending, width in ((also, 33), (on_the_way, 200_000)):
            wanted = torch.cat([payload(source, me, 3, width) for source in range(size)])
            assert torch.equal(pending.wait(), wanted)
        told += [plan.wait(), gathered.wait()]
    return told


def test_what_was_begun_first_may_be_awaited_last(rows: RowsChoice) -> None:
    for rank, told in enumerate(run_ranks(wait_out_of_the_way, 3, rows=rows)):
        for turn in range(4):
            plan, gathered = told[2 * turn : 2 * turn + 2]
            assert plan == [(turn, 2)]
            assert gathered == ([(turn, 0), (turn, 1), (turn, 2)] if rank == 1 else [])


def gather_and_sum(group: StepGroup, dtype: torch.dtype) -> None:
    me, size, experts = group.rank, group.world_size, group.expert_group
    mine = torch.full((2, 5), me, dtype=dtype)
    gathered = experts.gather_rows(mine, mine.new_empty(2 * size, 5)).wait()
    assert gathered[:, 0].tolist() == [rank for rank in range(size) for _ in range(2)]
    parts = torch.cat([torch.full((2, 5), 10 * me + target) for target in range(size)]).to(dtype)
    total = experts.sum_rows(parts, mine.new_empty(2, 5)).wait()
    assert total.unique().tolist() == [sum(10 * rank + me for rank in range(size))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_gathered_and_summed(rows: RowsChoice, dtype: torch.dtype) -> None:
    run_ranks(gather_and_sum, 4, dtype, rows=rows)


def tell_while_waiting(rank: int, address: str, rows: RowsChoice, parent: Parent) -> None:
    """Rank 0 waits for rank 1, which comes when another thread of rank 0 has spoken."""
    experts = ExpertGroup(seat=rank, num_seats=2, device=torch.device("cpu"))
    group = Rendezvous(experts, address, rows=rows).form(deadline_s=20)
    if rank == 1:
        parent.receive()
    waits = threading.Event()

    def speak() -> None:
        waits.wait()
        parent.send("another thread runs")

    thread = threading.Thread(target=speak)
    thread.start()
    waits.set()
    group.exchange([0])
    thread.join()
    parent.receive()


def test_other_threads_of_a_rank_run_while_it_waits(rows: RowsChoice) -> None:
    address = free_address()
    ranks = [start_rank(tell_while_waiting, rank, address, rows) for rank in range(2)]
    try:
        assert ranks[0].receive() == "another thread runs"
        ranks[1].send("come")
        assert ranks[1].receive() == "another thread runs"
    finally:
        for rank in ranks:
            rank.stop()


def idle_seconds(group: StepGroup) -> float:
    """CPU time of a rank while it waits for another one, which comes a second later."""
    if group.rank == 1:
        threading.Event().wait(1.0)
    before = time.process_time()
    group.exchange([0])
    return time.process_time() - before


def test_a_rank_that_waits_does_not_compute(rows: RowsChoice) -> None:
    assert max(run_ranks(idle_seconds, 2, rows=rows)) < 0.5


# -- who leaves, dies, or freezes -----------------------------------------------------------------


def exchange_until_it_breaks(rank: int, address: str, rows: RowsChoice, parent: Parent) -> None:
    """In groups of three; each time say that it has formed, and why and when it broke."""
    experts = ExpertGroup(seat=rank, num_seats=3, device=torch.device("cpu"))
    rendezvous = Rendezvous(
        experts, address, least=2, collective_timeout_s=STEP_TIMEOUT_S, rows=rows
    )
    while True:
        group = rendezvous.form(deadline_s=40)
        parent.send((group.members, group.rows))
        try:
            while parent.receive() == "exchange":
                group.exchange([0])
                exchanged(group, 2000, 4)
                parent.send("exchanged")
        except WorkerLost as error:
            parent.send(str(error))
        group.close()


@pytest.fixture
def three(rows: RowsChoice) -> Iterator[list[RankProcess]]:
    address = free_address()
    ranks = [start_rank(exchange_until_it_breaks, rank, address, rows) for rank in range(3)]
    for rank in ranks:
        members, carried_by = rank.receive()
        assert members == (0, 1, 2)
        assert carried_by.startswith(rows.replace("_", " "))
    yield ranks
    for rank in ranks:
        rank.stop()


def tell(ranks: Sequence[RankProcess], order: str) -> None:
    for rank in ranks:
        rank.send(order)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_go_on_without_a_rank_that_is_lost(
    three: list[RankProcess], number: signal.Signals
) -> None:
    tell(three, "exchange")
    assert [rank.receive() for rank in three] == ["exchanged"] * 3
    pid = three[1].process.pid
    assert pid is not None
    left = [three[0], three[2]]
    tell(left, "exchange")  # in which they wait for it
    os.kill(pid, number)
    for rank in left:
        assert "a rank was lost" in rank.receive()
        assert rank.receive()[0] == (0, 2)
    tell(left, "exchange")
    assert [rank.receive() for rank in left] == ["exchanged"] * 2
    if number == signal.SIGSTOP:  # what it does when it goes on is heard by nobody
        three[1].send("exchange")
        os.kill(pid, signal.SIGCONT)
        tell(left, "exchange")
        assert [rank.receive() for rank in left] == ["exchanged"] * 2


def test_a_lost_rank_is_named_by_its_seat_where_another_is_empty() -> None:
    address = free_address()
    ranks = [
        start_rank(exchange_until_it_breaks, rank, address, "shared_memory") for rank in range(3)
    ]
    try:
        for seat in (1, 2):
            for rank in ranks:
                rank.receive()  # who is in the group
            ranks.pop(1).stop()  # so seat 2 is the second of two when it is lost
            tell(ranks, "exchange")
            assert f"rank {seat} has left" in ranks[0].receive()  # who waits for it
            for rank in ranks[1:]:
                rank.receive()
    finally:
        for rank in ranks:
            rank.stop()


def test_who_leaves_ends_the_others_waits_at_once(three: list[RankProcess]) -> None:
    tell([three[0], three[2]], "exchange")
    began = time.monotonic()
    three[1].send("leave")
    assert "a rank was lost" in three[0].receive()
    assert time.monotonic() - began < STEP_TIMEOUT_S  # at which it would count as frozen


def what_a_closed_group_says(group: StepGroup) -> list[str]:
    """Each use of it after another exchange was left unfinished."""
    group.exchange([0])
    backend = group._control
    pending = group.begin_broadcast((1, 2), root=0)
    group.close()
    said: list[str] = []
    for use in (pending.wait, lambda: used(backend, group.world_size)):
        try:
            use()
        except (WorkerLost, RuntimeError) as error:
            said.append(type(error).__name__)
    return said


def used(backend: Backend, size: int) -> None:
    rows = torch.zeros(size, 1)
    backend._allgather_base(rows, rows[:1], AllgatherOptions()).wait()


def in_a_closed_group(rank: int, address: str, parent: Parent) -> None:
    experts = ExpertGroup(seat=rank, num_seats=2, device=torch.device("cpu"))
    group = Rendezvous(experts, address, rows="shared_memory").form(deadline_s=20)
    parent.send(what_a_closed_group_says(group))
    parent.receive()


def test_memory_is_not_touched_after_the_group_was_left() -> None:
    address = free_address()
    ranks = [start_rank(in_a_closed_group, rank, address) for rank in range(2)]
    try:
        for rank in ranks:
            said = rank.receive()
            assert said[-1] == "RuntimeError"
    finally:
        for rank in ranks:
            rank.stop()
