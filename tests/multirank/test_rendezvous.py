"""Ranks meet, lose one another, and meet again; nobody waits for ever."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch

from engine.collectives import ExpertGroup
from engine.experts.cover import cover, least_ranks
from engine.experts.layer import ExpertLayer
from engine.experts.placement import ExpertPlacement
from engine.meeting.doorman import MOST_STRANGERS
from engine.meeting.tickets import Sealed, Ticket
from engine.meeting.visit import visit
from engine.meeting.waiting import FormingProgress
from engine.rendezvous import Rendezvous
from protocol.errors import ConfigError, DeadlineExceeded, WorkerLost
from tests.multirank.test_expert_layer import (
    Case,
    layer_of,
    on_a_single_rank,
    placement_of,
    tokens_of,
)
from tests.support.ranks import Parent, RankProcess, free_address, start_rank

pytestmark = pytest.mark.multirank
CPU = torch.device("cpu")
# 7 experts and 5 replicas on 4 ranks: any three of them have slots for all experts.
CASE = Case(tokens_of_rank=(3, 0, 6, 2), num_experts=7, chosen=3, redundant=5)
SEATS = 4
STEP_TIMEOUT_S = 2.0
RECEIVED_S = 20.0


@dataclass(frozen=True)
class Life:
    epoch: int
    members: tuple[int, ...]
    results: list[list[float]]


def put_experts(layer: ExpertLayer, seat: int, placement: ExpertPlacement) -> None:
    """What ``SlotExchange`` does with a checkpoint: every slot gets its expert's weights."""
    alone = layer_of(replace(CASE, redundant=0), ExpertGroup.single(CPU))
    for slot, expert in enumerate(placement.slots_of(seat)):
        if expert >= 0:
            layer.weights.gate_up[slot].copy_(alone.weights.gate_up[expert])
            layer.weights.down[slot].copy_(alone.weights.down[expert])
    layer.place(placement)


@dataclass(frozen=True, kw_only=True)
class Options:
    first: int = SEATS
    terms: dict[str, str] = field(default_factory=dict)
    key: bytes = b""
    places: dict[int, str] = field(default_factory=dict)


FEW = Options(first=3)


def serve(seat: int, address: str, options: Options, parent: Parent) -> None:
    """Form a group, report, and run the layer until it breaks or somebody joins; then again."""
    expert_group = ExpertGroup(seat=seat, num_seats=SEATS, device=CPU)
    layer = layer_of(CASE, expert_group)
    tokens = tokens_of(CASE, seat)
    started = placement_of(CASE, SEATS)
    rendezvous = Rendezvous(
        expert_group,
        address,
        places=options.places,
        first=options.first,
        least=least_ranks(started),
        collective_timeout_s=STEP_TIMEOUT_S,
        terms=options.terms,
        key=options.key,
    )
    while True:
        group = rendezvous.form(deadline_s=40)
        put_experts(layer, seat, cover(started, group.members))
        expert_group.begin_step([CASE.tokens_of_rank[member] for member in group.members])
        try:
            parent.send(Life(group.epoch, group.members, layer(*tokens).tolist()))
            while not any(newcomers for (newcomers,) in group.exchange([rendezvous.newcomers])):
                layer(*tokens)
            parent.send("somebody joins")
        except WorkerLost as error:
            parent.send(str(error))
        group.close()


def connected(host: str, port: int) -> socket.socket:
    """As soon as somebody listens there."""
    deadline = time.monotonic() + RECEIVED_S
    while True:
        try:
            return socket.create_connection((host, port), timeout=RECEIVED_S)
        except OSError:
            if time.monotonic() > deadline:
                raise


def start(seat: int, address: str, options: Options = Options()) -> RankProcess:
    return start_rank(serve, seat, address, options)


@pytest.fixture
def ranks() -> Iterator[dict[int, RankProcess]]:
    started: dict[int, RankProcess] = {}
    yield started
    for rank in started.values():
        rank.stop()


def together(ranks: dict[int, RankProcess]) -> int:
    """All of ``ranks`` are in one group, which computes what a rank alone does; its epoch."""
    wanted = on_a_single_rank(CASE)
    epochs = set()
    for seat, rank in ranks.items():
        life = next_life(rank)
        assert life.members == tuple(sorted(ranks))
        assert life.results == wanted[seat].tolist()
        epochs.add(life.epoch)
    assert len(epochs) == 1
    return epochs.pop()


def next_life(rank: RankProcess) -> Life:
    """Skips what ended the one before, and lives that ended before all were there."""
    while not isinstance(life := rank.receive(), Life):
        pass
    return life


def send_signal(rank: RankProcess, number: signal.Signals) -> None:
    assert rank.process.pid is not None
    os.kill(rank.process.pid, number)


@pytest.mark.parametrize("victim", range(SEATS))
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_the_others_go_on_without_a_lost_rank_and_take_it_in_again(
    ranks: dict[int, RankProcess], how: signal.Signals, victim: int
) -> None:
    address = free_address()
    ranks |= {seat: start(seat, address) for seat in range(SEATS)}
    first = together(ranks)
    lost = ranks.pop(victim)
    try:
        send_signal(lost, how)

        second = together(ranks)

        assert second > first
        if how is signal.SIGKILL:
            ranks[victim] = start(victim, address)
        else:
            ranks[victim] = lost
            send_signal(lost, signal.SIGCONT)
        while (third := together_again(ranks)) is None:
            pass
        assert third > second
    finally:
        lost.stop()


def together_again(ranks: dict[int, RankProcess]) -> int | None:
    """The epoch in which all are together; None if some were together without others before."""
    lives = {}
    for seat, rank in ranks.items():
        lives[seat] = next_life(rank)
        while len(lives[seat].members) < len(ranks):
            lives[seat] = next_life(rank)
    latest = max(life.epoch for life in lives.values())
    wanted = on_a_single_rank(CASE)
    assert all(life.results == wanted[seat].tolist() for seat, life in lives.items())
    return latest if {life.epoch for life in lives.values()} == {latest} else None


def test_two_lost_at_once_are_too_many_and_are_waited_for(ranks: dict[int, RankProcess]) -> None:
    address = free_address()
    ranks |= {seat: start(seat, address) for seat in range(SEATS)}
    first = together(ranks)
    for seat in (0, 3):
        ranks[seat].stop()
    for seat in (1, 2):
        assert "a rank was lost" in ranks[seat].receive()
        assert not ranks[seat].pipe.poll(0.5)  # three are needed

    ranks[3] = start(3, address)  # it knows of rank 0 only
    ranks[0] = start(0, address)

    assert together(ranks) > first


@pytest.mark.parametrize("lost", [1, 3], ids=["who led", "who followed"])
def test_a_new_rank_finds_a_group_that_has_lost_rank_0(
    ranks: dict[int, RankProcess], lost: int
) -> None:
    address = free_address()
    placed = Options(places={seat: free_address() for seat in range(1, SEATS)})
    ranks |= {seat: start(seat, address, placed) for seat in range(SEATS)}
    together(ranks)
    ranks.pop(0).stop()
    together(ranks)
    ranks[lost].stop()  # now too few are left

    ranks[lost] = start(lost, address, placed)

    while together_again(ranks) is None:
        pass
    ranks[0] = start(0, address, placed)
    while together_again(ranks) is None:
        pass


def test_all_ranks_may_restart_at_once(ranks: dict[int, RankProcess]) -> None:
    address = free_address()
    for _ in range(2):
        ranks |= {seat: start(seat, address) for seat in range(SEATS)}
        together(ranks)
        for rank in ranks.values():
            rank.stop()


def test_a_group_begins_with_fewer_where_that_is_enough(ranks: dict[int, RankProcess]) -> None:
    address = free_address()
    ranks |= {seat: start(seat, address, FEW) for seat in (0, 1, 3)}
    first = together(ranks)
    ranks[2] = start(2, address, FEW)
    assert together(ranks) > first


def test_a_rank_with_other_terms_is_told_and_the_others_go_on(
    ranks: dict[int, RankProcess],
) -> None:
    address = free_address()
    right, wrong = replace(FEW, terms={"weights": "a"}), Options(terms={"weights": "b"})
    ranks |= {seat: start(seat, address, right) for seat in (0, 1, 2)}
    together(ranks)
    other = start(3, address, wrong)
    with pytest.raises(AssertionError, match="weights is b on rank 3, a on rank 0"):
        other.receive()
    assert not any(rank.pipe.poll() for rank in ranks.values())


def test_a_rank_0_that_comes_with_other_terms_ends_alone(ranks: dict[int, RankProcess]) -> None:
    """The group that serves would meet at rank 0's, but it is rank 0 that does not fit in."""
    address = free_address()
    right, wrong = Options(terms={"weights": "a"}), Options(terms={"weights": "b"})
    ranks |= {seat: start(seat, address, right) for seat in range(SEATS)}
    together(ranks)
    ranks.pop(0).stop()
    together(ranks)

    other = start(0, address, wrong)
    with pytest.raises(AssertionError, match=r"weights is a on rank \d, b on rank 0"):
        other.receive()

    ranks[0] = start(0, address, right)
    while together_again(ranks) is None:
        pass


def test_a_rank_without_the_key_is_not_received(ranks: dict[int, RankProcess]) -> None:
    address = free_address()
    secret = replace(FEW, key=b"k" * 32)
    ranks |= {seat: start(seat, address, secret) for seat in (0, 1, 2)}
    together(ranks)
    expert_group = ExpertGroup(seat=3, num_seats=SEATS, device=CPU)
    stranger = Rendezvous(expert_group, address, attempt_s=1, key=b"other")
    with pytest.raises(DeadlineExceeded, match="last failure: rank 0: "):
        stranger.form(deadline_s=1.5)
    stranger.close()
    assert not any(rank.pipe.poll() for rank in ranks.values())


def test_a_rank_of_another_group_is_not_received(ranks: dict[int, RankProcess]) -> None:
    """It may come by a port that has been used before."""
    address = free_address()
    ranks |= {seat: start(seat, address, FEW) for seat in (0, 1, 2)}
    together(ranks)
    expert_group = ExpertGroup(seat=3, num_seats=SEATS, device=CPU)
    stranger = Rendezvous(expert_group, address, name="another", attempt_s=1)
    with pytest.raises(DeadlineExceeded, match="a rank of another group answers there"):
        stranger.form(deadline_s=1.5)
    stranger.close()
    assert not any(rank.pipe.poll() for rank in ranks.values())


@pytest.mark.parametrize("rank", [-1, 0, SEATS, 10**6])
def test_a_ticket_for_a_rank_that_cannot_come_changes_no_group(
    ranks: dict[int, RankProcess], rank: int
) -> None:
    address = free_address()
    ranks |= {seat: start(seat, address, FEW) for seat in (0, 1, 2)}
    together(ranks)
    group = f":{address.rpartition(':')[2]}"
    ticket = Ticket(rank=rank, number=1, address="", last_epoch=99, last_members=(), terms={})
    with pytest.raises(ConfigError, match=f"rank {rank} cannot come to rank 0"):
        visit(address, ticket, group=group, key=b"", on_wait=lambda: None)
    assert not any(process.pipe.poll(0.2) for process in ranks.values())


def test_who_sends_a_byte_at_a_time_is_not_waited_for() -> None:
    host, visitor = socket.socketpair()
    with host, visitor:
        host.settimeout(0.2)
        sealed = Sealed(host, group="", key=b"", host=True)
        stopped = threading.Event()

        def drip() -> None:
            while not stopped.wait(0.01):
                visitor.send(b"\0" if visitor.fileno() >= 0 else b"")

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            visitor.send((200_000).to_bytes(4, "little"))
            with pytest.raises(WorkerLost, match="did not come in time"):
                sealed.ticket()
        finally:
            stopped.set()
            dripping.join(5)


def rendezvous_of(seat: int, seats: int, address: str) -> Rendezvous:
    return Rendezvous(ExpertGroup(seat=seat, num_seats=seats, device=CPU), address, attempt_s=0.3)


def test_a_rank_that_waits_alone_says_for_whom_and_gives_up_in_time() -> None:
    seen: list[FormingProgress] = []
    alone = rendezvous_of(0, 3, free_address())
    with pytest.raises(DeadlineExceeded, match="missing ranks: 1, 2"):
        alone.form(deadline_s=1.2, on_progress=seen.append)
    assert seen[0].missing_ranks == (1, 2)
    alone.close()


def test_without_rank_0_the_others_give_up_in_time() -> None:
    alone = rendezvous_of(1, 2, free_address())
    with pytest.raises(DeadlineExceeded, match="last failure: rank 0: nobody answers"):
        alone.form(deadline_s=0.5)
    alone.close()


@pytest.mark.parametrize("address", ["29500", "127.0.0.1:", "127.0.0.1:port"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="rendezvous must be host:port"):
        rendezvous_of(0, 2, address)


def test_a_port_that_another_process_holds_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*port is in use"):
            rendezvous_of(0, 2, f"127.0.0.1:{port}").form(deadline_s=30)


def test_an_address_of_another_host_is_named() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:4000.*address of this host"):
        rendezvous_of(0, 2, "192.0.2.1:4000").form(deadline_s=30)


def test_one_rank_needs_nobody() -> None:
    alone = rendezvous_of(0, 1, "unused")
    assert [alone.form(deadline_s=1).epoch for _ in range(2)] == [1, 2]
    assert alone.form(deadline_s=1).exchange([1, 2]) == [(1, 2)]


def test_a_group_that_is_closed_exchanges_nothing() -> None:
    group = ExpertGroup(seat=0, num_seats=2, device=CPU)
    with pytest.raises(WorkerLost, match="not connected"):
        group.exchange_rows(torch.zeros(2, 3), [1, 1], [1, 1])


def test_who_connects_and_says_nothing_gives_way_to_the_ranks(
    ranks: dict[int, RankProcess],
) -> None:
    address = free_address()
    ranks[0] = start(0, address, FEW)
    strangers: list[socket.socket] = []
    host, _, port = address.rpartition(":")
    try:
        for _ in range(2 * MOST_STRANGERS):
            strangers.append(connected(host, int(port)))
        ranks |= {seat: start(seat, address, FEW) for seat in (1, 2)}
        together(ranks)
        first = strangers[0]
        first.settimeout(RECEIVED_S)
        while first.recv(64):  # the greeting; then it ends
            pass
    finally:
        for stranger in strangers:
            stranger.close()
