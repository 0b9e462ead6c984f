from dataclasses import dataclass, field

import pytest
import torch

from decode.intake import Arrived, Intake, Lost
from decode.load import LoadAccount
from decode.scheduler import DecodeScheduler
from engine.experts.meter import ExchangeMeter
from engine.kvcache.block_pool import BlockPool
from kvtransfer.interface import Committed, Quiet, TransferFailed
from protocol.codec import encode
from protocol.errors import DeadlineExceeded, TransferTimeout
from protocol.ids import AttemptRef, Generation, Incarnation, RequestId, WorkerId, WorkerRef
from protocol.kv import Grant, KVEndpoint
from protocol.messages import Granted, HandOff, Rejected, Reserve
from protocol.requests import GenerateRequest, SamplingParams, StopConditions

BLOCK_TOKENS = 4
NUM_BLOCKS = 8


@dataclass
class RecordingSink:
    """Remembers what it was told; the transports' side is played by the test."""

    expected: list[Grant] = field(default_factory=list)
    aborted: list[Grant] = field(default_factory=list)
    endpoint: KVEndpoint = field(
        default_factory=lambda: KVEndpoint(host_id="h", num_blocks=NUM_BLOCKS, addresses={})
    )

    def expect(self, grant: Grant) -> None:
        self.expected.append(grant)

    def abort(self, grant: Grant) -> None:
        self.aborted.append(grant)

    def close(self) -> None: ...


@dataclass
class Rank:
    sink: RecordingSink
    swapped_out: list[AttemptRef]
    scheduler: DecodeScheduler
    intake: Intake

    def free(self) -> int:
        return self.scheduler.books().free


@pytest.fixture
def rank() -> Rank:
    sink = RecordingSink()
    swapped_out: list[AttemptRef] = []
    scheduler = DecodeScheduler(
        BlockPool(NUM_BLOCKS), block_tokens=BLOCK_TOKENS, max_batch=4, headroom_blocks=0
    )
    intake = Intake(
        worker=WorkerRef(WorkerId("decode-0/0"), Incarnation(1)),
        scheduler=scheduler,
        sink=sink,
        layout_digest="l",
        max_model_len=NUM_BLOCKS * BLOCK_TOKENS,
        max_granted=3,
        swap_out=lambda ref, _: swapped_out.append(ref),
    )
    return Rank(sink, swapped_out, scheduler, intake)


def a_reserve(
    name: str = "r", *, prompt: int = 6, max_tokens: int = 4, caller: str = ""
) -> Reserve:
    request = GenerateRequest(
        request_id=RequestId(name),
        attempt=0,
        model="m",
        prompt_token_ids=tuple(range(prompt)),
        sampling=SamplingParams(),
        stop=StopConditions(max_tokens=max_tokens),
        caller=caller,
    )
    return Reserve(request=request, remaining_s=10.0)


def granted(rank: Rank, reserve: Reserve) -> Grant:
    answer = rank.intake.reserve(reserve, now=0.0)
    assert isinstance(answer, Granted)
    return answer.grant


def committed(grant: Grant) -> Committed:
    payload = encode(HandOff(token_id=7, finish_reason=None))
    return Committed(ref=grant.ref, generation=grant.generation, payload=payload, bytes_received=1)


def test_a_reservation_is_expected_by_the_transports_before_it_is_answered(rank: Rank) -> None:
    grant = granted(rank, a_reserve())
    assert rank.sink.expected == [grant]
    assert len(grant.block_ids) == 2
    assert rank.free() == NUM_BLOCKS - 2


def test_asking_twice_gives_the_same_grant_and_takes_nothing_more(rank: Rank) -> None:
    assert granted(rank, a_reserve()) == granted(rank, a_reserve())
    assert len(rank.sink.expected) == 1
    assert rank.free() == NUM_BLOCKS - 2


def test_a_committed_grant_arrives_once(rank: Rank) -> None:
    grant = granted(rank, a_reserve())
    arrived = rank.intake.hear(committed(grant))
    assert isinstance(arrived, Arrived)
    assert arrived.hand_off.token_id == 7
    assert rank.intake.hear(committed(grant)) is None


def test_a_cancelled_grant_keeps_its_blocks_until_the_transports_are_quiet(rank: Rank) -> None:
    grant = granted(rank, a_reserve())
    assert rank.intake.cancel(grant.ref)
    assert rank.sink.aborted == [grant]
    assert rank.free() == NUM_BLOCKS - 2
    rank.intake.hear(Quiet(ref=grant.ref, generation=grant.generation))
    assert rank.free() == NUM_BLOCKS


def test_a_commit_that_crosses_the_cancel_is_proof_enough(rank: Rank) -> None:
    grant = granted(rank, a_reserve())
    rank.intake.cancel(grant.ref)
    assert rank.intake.hear(committed(grant)) is None
    assert rank.free() == NUM_BLOCKS


def test_a_failed_transfer_is_told_once_and_its_blocks_wait_for_proof(rank: Rank) -> None:
    grant = granted(rank, a_reserve())
    failed = TransferFailed(
        ref=grant.ref, generation=grant.generation, error=TransferTimeout("stalled")
    )
    assert isinstance(rank.intake.hear(failed), Lost)
    assert rank.intake.hear(failed) is None
    assert rank.free() == NUM_BLOCKS - 2
    rank.intake.hear(Quiet(ref=grant.ref, generation=grant.generation))
    assert rank.free() == NUM_BLOCKS


def test_a_hand_off_that_cannot_be_read_fails_its_request_alone(rank: Rank) -> None:
    grant = granted(rank, a_reserve())
    garbage = Committed(
        ref=grant.ref, generation=grant.generation, payload=b"garbage", bytes_received=1
    )
    lost = rank.intake.hear(garbage)
    assert isinstance(lost, Lost)
    assert lost.error.code == "kv_transfer_corrupt"
    assert rank.free() == NUM_BLOCKS


def test_an_event_of_another_generation_changes_nothing(rank: Rank) -> None:
    grant = granted(rank, a_reserve())
    stale = Committed(
        ref=grant.ref,
        generation=Generation(grant.generation + 1),
        payload=encode(HandOff(token_id=1, finish_reason=None)),
        bytes_received=0,
    )
    assert rank.intake.hear(stale) is None
    assert isinstance(rank.intake.hear(committed(grant)), Arrived)


def test_a_grant_expires_with_its_request(rank: Rank) -> None:
    grant = granted(rank, a_reserve())
    assert rank.intake.expire(now=9.0) == []
    (lost,) = rank.intake.expire(now=10.0)
    assert isinstance(lost.error, DeadlineExceeded)
    assert rank.sink.aborted == [grant]


def test_a_cancel_that_overtakes_its_reservation_wins(rank: Rank) -> None:
    reserve = a_reserve()
    assert not rank.intake.cancel(reserve.request.ref)
    answer = rank.intake.reserve(reserve, now=0.0)
    assert isinstance(answer, Rejected)
    assert answer.error.code == "cancelled"
    assert rank.free() == NUM_BLOCKS


@pytest.mark.parametrize(
    ("reserve", "code"),
    [
        (a_reserve(prompt=30, max_tokens=10), "context_length_exceeded"),
        (a_reserve(prompt=25, max_tokens=2), "overloaded"),
    ],
    ids=["can never fit", "no blocks now"],
)
def test_what_cannot_be_granted_is_rejected_with_the_reason(
    rank: Rank, reserve: Reserve, code: str
) -> None:
    granted(rank, a_reserve("other", prompt=8))
    answer = rank.intake.reserve(reserve, now=0.0)
    assert isinstance(answer, Rejected)
    assert answer.error.code == code


def test_a_draining_rank_and_too_many_grants_are_rejections(rank: Rank) -> None:
    for name in "abc":
        granted(rank, a_reserve(name, prompt=2))
    full = rank.intake.reserve(a_reserve("d", prompt=2), now=0.0)
    assert isinstance(full, Rejected)
    assert full.error.code == "overloaded"
    rank.intake.draining = True
    draining = rank.intake.reserve(a_reserve("e", prompt=2), now=0.0)
    assert isinstance(draining, Rejected)
    assert draining.error.code == "draining"


def test_a_rank_tells_its_room_before_its_first_step(rank: Rank) -> None:
    account = LoadAccount(rank.scheduler, rank.intake, ExchangeMeter(torch.device("cpu")))

    assert account.load.free_blocks == account.load.total_blocks == NUM_BLOCKS


def test_who_gives_way_is_swapped_out_before_the_grant_is_known(rank: Rank) -> None:
    for name in "ab":
        grant = granted(rank, a_reserve(name, prompt=BLOCK_TOKENS * NUM_BLOCKS // 2, max_tokens=1))
        assert isinstance(rank.intake.hear(committed(grant)), Arrived)
        rank.scheduler.commit(grant.ref, 7)
    expected = len(rank.sink.expected)
    grant = granted(rank, a_reserve("c", prompt=1, caller="another"))
    assert [ref.request_id for ref in rank.swapped_out] == ["b"]
    assert rank.sink.expected[expected:] == [grant]
    account = LoadAccount(rank.scheduler, rank.intake, ExchangeMeter(torch.device("cpu")))
    assert account.load.free_blocks == 0 < account.load.spare_blocks
    assert {held.caller: held.swapped_requests for held in account.load.holdings} == {
        "": 1,
        "another": 0,
    }
