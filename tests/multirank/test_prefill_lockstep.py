"""A leader and its follower over a real connection: orders, reports, losses, the end.

Both are threads here, so each can be looked at; what they compute is scripted.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch

from engine.collectives import ExpertGroup
from engine.meeting.joining import RankMeeting
from engine.rendezvous import Rendezvous
from prefill.follower import FollowerLoop
from prefill.forward import SendLayers
from prefill.joint_push import JointSource
from prefill.lockstep import Part
from prefill.ranks import LeadRank
from protocol.errors import TransferError, WorkerLost
from protocol.ids import BlockId, WorkerId
from protocol.workers import LinkReport
from tests.support.ranks import free_address
from tests.unit.prefill.test_joint_push import BROKEN, ScriptedSource, grant_of, part_of

pytestmark = pytest.mark.multirank
CPU = torch.device("cpu")
LATE_S = 10.0


@dataclass
class ScriptedForward:
    """Computes nothing, sends what it is given, and fails when it is told to."""

    steps: list[tuple[Part, ...]] = field(default_factory=list)
    failure: Exception | None = None

    busy = False

    def advance(self, parts: Sequence[Part], send: SendLayers) -> None:
        self.steps.append(tuple(parts))
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        for part in parts:
            send(part, range(2))

    def forget(self) -> None:
        """Nothing is on its way."""


class Follower:
    def __init__(self, address: str) -> None:
        self.forward = ScriptedForward()
        self.sources: list[ScriptedSource] = []
        self.served: list[bool] = []
        self.loop = FollowerLoop(
            self.forward,  # type: ignore[arg-type]
            meeting_of(1, address),
            make_source=self._make_source,
            on_serving=lambda: self.served.append(True),
        )
        self._thread = threading.Thread(target=self.loop.run, daemon=True)
        self._thread.start()

    def _make_source(self) -> ScriptedSource:
        self.sources.append(ScriptedSource())
        return self.sources[-1]

    @property
    def lives(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> None:
        self.loop.stop()
        self._thread.join(LATE_S)
        assert not self.lives


def meeting_of(rank: int, address: str) -> RankMeeting:
    group = ExpertGroup(seat=rank, num_seats=2, device=CPU)
    rendezvous = Rendezvous(
        group, address, role="prefill", rows="gloo", collective_timeout_s=LATE_S, attempt_s=LATE_S
    )
    return RankMeeting(rendezvous, patience_s=LATE_S)


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LATE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {LATE_S} s: {what}"
        time.sleep(0.002)


def never() -> bool:
    return False


@dataclass
class Lead:
    ranks: LeadRank
    source: JointSource
    own: ScriptedSource
    changes: list[bool]

    def step(self, *parts: Part) -> None:
        self.ranks.begin_step(parts)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        def stepped() -> bool:
            self.step()
            return condition()

        eventually(stepped, what)


@pytest.fixture
def address() -> str:
    return free_address()


@pytest.fixture
def follower(address: str) -> Iterator[Follower]:
    follower = Follower(address)
    yield follower
    follower.end()


@pytest.fixture
def lead(address: str, follower: Follower) -> Iterator[Lead]:
    own = ScriptedSource()
    source = JointSource(own, senders=[1])
    changes: list[bool] = []
    ranks = LeadRank(
        meeting_of(0, address), source, on_membership=lambda: changes.append(ranks.together)
    )
    assert ranks.meet(never)
    yield Lead(ranks, source, own, changes)
    ranks.close()


def test_a_follower_opens_computes_and_ends_what_it_is_told_in_that_order(
    lead: Lead, follower: Follower
) -> None:
    outcomes: list[TransferError | None] = []
    push = lead.source.open(grant_of("a"))
    lead.step(part_of("a"))
    push.finish(b"first token", outcomes.append)
    lead.step()
    eventually(lambda: follower.sources[0].pushes[0].payload is not None, "the share is finished")
    share = follower.sources[0].pushes[0]
    assert follower.forward.steps == [(part_of("a"),)]
    assert share.sent == [(range(2), 1, (BlockId(7),))]
    assert share.payload == b"", "the leader's payload counts"
    lead.own.pushes[0].end()
    share.end()
    lead.until(lambda: outcomes == [None], "the follower's report")
    assert follower.served == [True]


def test_a_followers_broken_share_reaches_the_leaders_push(lead: Lead, follower: Follower) -> None:
    push = lead.source.open(grant_of("a"))
    lead.step()
    eventually(lambda: bool(follower.sources[0].pushes), "the share is open")
    follower.sources[0].pushes[0].broken = BROKEN
    lead.step(part_of("a"))

    def failed() -> bool:
        try:
            push.send(range(1), 0, [BlockId(1)])
        except TransferError as error:
            return "rank 1" in str(error)
        return False

    lead.until(failed, "the push has failed")


def test_a_followers_links_are_told_with_the_leaders(lead: Lead, follower: Follower) -> None:
    own, other = (
        LinkReport(prefill=WorkerId(name), decode=WorkerId("d/0"), transport="shm", reason="near")
        for name in ("p", "p/1")
    )
    lead.step()
    lead.own.reached = (own,)
    follower.sources[0].reached = (other,)
    lead.until(lambda: lead.source.links() == (own, other), "the follower's link")
    lead.ranks.lose()
    assert lead.source.links() == (own,)


def test_a_follower_that_cannot_compute_ends_the_life_and_both_meet_again(
    lead: Lead, follower: Follower
) -> None:
    lead.source.open(grant_of("a"))
    follower.forward.failure = MemoryError("no room")
    lead.step(part_of("a"))
    with pytest.raises(WorkerLost):
        lead.until(never, "the loss")
    lead.ranks.lose()
    assert not lead.ranks.together
    with pytest.raises(WorkerLost):
        lead.source.open(grant_of("b"))
    assert lead.ranks.meet(never)
    lead.source.open(grant_of("c"))
    lead.step(part_of("c"))
    eventually(lambda: follower.forward.steps[-1] == (part_of("c"),), "the next life computes")
    assert len(follower.sources) == 2, "what was open is closed with its life"
    assert lead.changes == [True, False, True]


def test_what_fails_at_the_leader_while_all_compute_is_a_loss_for_all(lead: Lead) -> None:
    with pytest.raises(WorkerLost, match="computing failed: MemoryError"), lead.ranks.computing():
        raise MemoryError("no room")


def test_followers_leave_with_their_leader(lead: Lead, follower: Follower) -> None:
    lead.step()
    lead.ranks.leave()
    eventually(lambda: not follower.lives, "the follower has ended")
    assert not lead.ranks.together


def test_a_follower_that_is_to_drain_asks_its_leader(lead: Lead, follower: Follower) -> None:
    assert not lead.ranks.drain_asked
    follower.loop.drain()
    lead.until(lambda: lead.ranks.drain_asked, "the leader has heard it")
    assert follower.lives, "it serves until the leader ends"
    lead.ranks.leave()
    eventually(lambda: not follower.lives, "the follower has ended")


def test_a_rank_that_waits_for_the_others_can_be_given_up(address: str) -> None:
    own = ScriptedSource()
    alone = LeadRank(
        meeting_of(0, address), JointSource(own, senders=[1]), on_membership=lambda: None
    )
    assert not alone.meet(lambda: True)
    alone.close()
