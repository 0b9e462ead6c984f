"""Ranks meet, lose one another, and meet again; nobody waits for ever."""

import os
import signal
import socket
from dataclasses import dataclass

import pytest
import torch

from engine.collectives import ExpertGroup
from engine.rendezvous import FormingProgress, form_group
from protocol.errors import ConfigError, DeadlineExceeded, WorkerLost
from tests.multirank.test_expert_layer import Case, layer_of, on_a_single_rank, tokens_of
from tests.support.ranks import Parent, RankProcess, free_address, start_rank

pytestmark = pytest.mark.multirank
CPU = torch.device("cpu")
CASE = Case(tokens_of_rank=(3, 0, 6), num_experts=7, chosen=3)
WORLD_SIZE = 3


@dataclass(frozen=True)
class Life:
    epoch: int
    results: list[list[float]]


def serve(rank: int, address: str, parent: Parent) -> None:
    """Form a group, report, and run the layer until told otherwise; again after every loss."""
    expert_group = ExpertGroup(rank=rank, world_size=WORLD_SIZE, device=CPU)
    layer = layer_of(CASE, expert_group)
    tokens = tokens_of(CASE, rank)
    epoch = 0
    while True:
        group = form_group(
            rank,
            WORLD_SIZE,
            address,
            device=CPU,
            deadline_s=40,
            last_epoch=epoch,
            collective_timeout_s=2,
            expert_group=expert_group,
        )
        epoch = group.epoch
        expert_group.begin_step(CASE.tokens_of_rank)
        try:
            parent.send(Life(epoch, layer(*tokens).tolist()))
            while True:
                group.exchange([epoch])
                layer(*tokens)
        except WorkerLost as error:
            group.close()
            parent.send(str(error))


def lives_of(ranks: list[RankProcess]) -> list[Life]:
    lives = []
    for rank in ranks:
        life = rank.receive()
        assert isinstance(life, Life), life
        lives.append(life)
    wanted = [part.tolist() for part in on_a_single_rank(CASE)]
    assert [life.results for life in lives] == wanted
    assert len({life.epoch for life in lives}) == 1
    return lives


@pytest.mark.parametrize(
    ("how", "victim"),
    [(signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGKILL, 2), (signal.SIGSTOP, 1)],
    ids=["rank 0 killed", "rank 1 killed", "rank 2 killed", "rank 1 stopped"],
)
def test_survivors_notice_a_lost_rank_and_go_on_with_its_replacement(
    victim: int, how: signal.Signals
) -> None:
    address = free_address()
    ranks = [start_rank(serve, rank, address) for rank in range(WORLD_SIZE)]
    lost = ranks[victim]
    try:
        first = lives_of(ranks)[0].epoch
        assert lost.process.pid is not None
        os.kill(lost.process.pid, how)
        for rank in range(WORLD_SIZE):
            if rank != victim:
                assert "a rank was lost during" in ranks[rank].receive()
        lost.process.kill()  # what stopped has hung for good; its supervisor ends it
        ranks[victim] = start_rank(serve, victim, address)

        assert lives_of(ranks)[0].epoch > first
    finally:
        for process in [*ranks, lost]:
            process.stop()


def test_all_ranks_may_restart_at_once() -> None:
    address = free_address()
    for _ in range(2):
        ranks = [start_rank(serve, rank, address) for rank in range(WORLD_SIZE)]
        try:
            lives_of(ranks)
        finally:
            for rank in ranks:
                rank.stop()


def test_a_rank_that_waits_alone_says_for_whom_and_gives_up_in_time() -> None:
    seen: list[FormingProgress] = []
    with pytest.raises(DeadlineExceeded, match="missing ranks: 1, 2"):
        form_group(0, 3, free_address(), device=CPU, deadline_s=1.2, on_progress=seen.append)
    assert seen[0].missing_ranks == (1, 2)


def test_without_rank_0_the_others_give_up_in_time() -> None:
    with pytest.raises(DeadlineExceeded, match="last failure: meeting failed"):
        form_group(1, 2, free_address(), device=CPU, deadline_s=0.5, attempt_s=0.3)


@pytest.mark.parametrize("address", ["29500", "127.0.0.1:", "127.0.0.1:port"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="rendezvous must be host:port"):
        form_group(0, 2, address, device=CPU, deadline_s=1)


def test_a_port_that_another_process_holds_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*port is in use"):
            form_group(0, 2, f"127.0.0.1:{port}", device=CPU, deadline_s=30)


def test_an_address_of_another_host_is_named() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1:4000.*address of this host"):
        form_group(0, 2, "192.0.2.1:4000", device=CPU, deadline_s=30)


def test_one_rank_needs_nobody() -> None:
    group = form_group(0, 1, "unused", device=CPU, deadline_s=1, last_epoch=4)
    assert group.epoch == 5
    assert group.exchange([1, 2]) == [(1, 2)]


def test_a_group_that_is_closed_exchanges_nothing() -> None:
    group = ExpertGroup(rank=0, world_size=2, device=CPU)
    with pytest.raises(WorkerLost, match="not connected"):
        group.exchange_rows(torch.zeros(2, 3), [1, 1], [1, 1])
