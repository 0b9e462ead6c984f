"""One push that several ranks fill: when it is over, when its blocks are free, what others hear."""

import logging
from collections.abc import Callable, Sequence

import pytest

from kvtransfer.interface import Push
from prefill.follower import Shares
from prefill.joint_push import JointSource
from prefill.lockstep import REPORTS_PER_ROW, EndPush, Part, PushOutcome, PushReport
from protocol.errors import TransferAborted, TransferError, WorkerLost
from protocol.ids import AttemptRef, BlockId, RequestId
from protocol.kv import Grant, KVLayout
from protocol.workers import LinkReport
from tests.support.transfers import a_grant, a_worker

LAYOUT = KVLayout(
    kind="gqa",
    dtype="float32",
    num_layers=2,
    block_tokens=16,
    kv_heads=2,
    key_width=4,
    value_width=4,
)
BROKEN = TransferError("the connection is down")


class ScriptedPush:
    """Ends when the test says so."""

    def __init__(self) -> None:
        self.sent: list[tuple[range, int, tuple[BlockId, ...]]] = []
        self.payload: bytes | None = None
        self.aborted: str | None = None
        self.broken: TransferError | None = None
        self._on_finished: Callable[[TransferError | None], None] | None = None
        self._on_aborted: Callable[[], None] | None = None

    def send(self, layers: range, first_block: int, source_blocks: Sequence[BlockId]) -> None:
        if self.broken is not None:
            raise self.broken
        self.sent.append((layers, first_block, tuple(source_blocks)))

    def finish(self, payload: bytes, on_done: Callable[[TransferError | None], None]) -> None:
        self.payload, self._on_finished = payload, on_done

    def abort(self, reason: str, on_done: Callable[[], None]) -> None:
        self.aborted, self._on_aborted = reason, on_done

    def end(self, error: TransferError | None = None) -> None:
        if self._on_finished is not None:
            self._on_finished(error)
        if self._on_aborted is not None:
            self._on_aborted()


class ScriptedSource:
    def __init__(self) -> None:
        self.pushes: list[ScriptedPush] = []
        self.refuses = False
        self.reached: tuple[LinkReport, ...] = ()

    def open(self, grant: Grant) -> Push:
        if self.refuses:
            raise BROKEN
        self.pushes.append(ScriptedPush())
        return self.pushes[-1]

    def links(self) -> tuple[LinkReport, ...]:
        return self.reached

    def close(self) -> None:
        pass


def grant_of(name: str) -> Grant:
    return a_grant(a_worker(), [0, 1], layout=LAYOUT, request=name)


def part_of(name: str) -> Part:
    return Part(
        ref=AttemptRef(RequestId(name), 0),
        start=0,
        token_ids=(1, 2, 3),
        blocks=(BlockId(4), BlockId(7)),
        first_block=1,
        final=True,
        scored=False,
    )


@pytest.fixture
def own() -> ScriptedSource:
    return ScriptedSource()


@pytest.fixture
def joint(own: ScriptedSource) -> JointSource:
    source = JointSource(own, senders=[1, 2])
    source.enter_group()
    return source


ENDED = PushReport(0, PushOutcome.ENDED)
FAILED = PushReport(0, PushOutcome.FAILED)


def test_a_push_is_over_when_every_rank_has_ended_its_share(
    joint: JointSource, own: ScriptedSource
) -> None:
    outcomes: list[TransferError | None] = []
    joint.open(grant_of("a")).finish(b"first token", outcomes.append)
    assert own.pushes[0].payload == b"first token"
    joint.hear(2, ENDED)
    own.pushes[0].end()
    assert outcomes == []
    assert joint.awaits_others
    joint.hear(1, ENDED)
    assert outcomes == [None]
    assert not joint.awaits_others


def test_the_others_are_told_what_was_opened_and_ended_once_and_in_order(
    joint: JointSource,
) -> None:
    first, second = joint.open(grant_of("a")), joint.open(grant_of("b"))
    second.abort("cancelled", lambda: None)
    opened, ended = joint.take_orders()
    assert [grant.ref.request_id for grant in opened] == ["a", "b"]
    assert ended == (EndPush(1, "cancelled"),)
    first.finish(b"", lambda _: None)
    assert joint.take_orders() == ((), (EndPush(0, None),))
    assert joint.take_orders() == ((), ())


def test_a_share_that_fails_stops_the_push_before_the_prompt_is_computed(
    joint: JointSource, own: ScriptedSource
) -> None:
    push = joint.open(grant_of("a"))
    push.send(range(1), 0, [BlockId(1)])
    joint.hear(1, FAILED)
    with pytest.raises(TransferError, match="rank 1 could not push"):
        push.send(range(1, 2), 0, [BlockId(1)])
    assert len(own.pushes[0].sent) == 1


def test_the_own_share_says_whether_the_decode_rank_has_everything(
    joint: JointSource, own: ScriptedSource
) -> None:
    outcomes: list[TransferError | None] = []
    joint.open(grant_of("a")).finish(b"", outcomes.append)
    own.pushes[0].end(BROKEN)
    for rank in (1, 2):
        joint.hear(rank, FAILED)
        joint.hear(rank, ENDED)
    assert outcomes == [BROKEN]


def test_lost_ranks_are_not_waited_for_and_what_is_not_computed_fails(
    joint: JointSource, own: ScriptedSource
) -> None:
    computed, computing = joint.open(grant_of("a")), joint.open(grant_of("b"))
    outcomes: list[TransferError | None] = []
    computed.finish(b"", outcomes.append)
    own.pushes[0].end()
    joint.leave_group()
    assert outcomes == [None]
    with pytest.raises(TransferError, match="a rank of the prefill worker was lost"):
        computing.send(range(1), 0, [BlockId(1)])
    freed: list[bool] = []
    computing.abort("lost", lambda: freed.append(True))
    own.pushes[1].end()
    assert freed == [True]
    assert joint.take_orders() == ((), ())


def test_without_the_other_ranks_nothing_is_opened(own: ScriptedSource) -> None:
    source = JointSource(own, senders=[1])
    with pytest.raises(WorkerLost):
        source.open(grant_of("a"))
    assert own.pushes == []


def test_a_push_of_an_earlier_life_does_not_end_one_of_the_next(
    joint: JointSource, own: ScriptedSource
) -> None:
    old = joint.open(grant_of("a"))
    joint.leave_group()
    joint.enter_group()
    joint.open(grant_of("b"))
    joint.take_orders()
    old.abort("lost", lambda: None)
    assert joint.take_orders() == ((), ())


def test_where_no_other_rank_sends_the_push_is_the_own_one(own: ScriptedSource) -> None:
    source = JointSource(own, senders=[])
    source.enter_group()
    assert source.open(grant_of("a")) is own.pushes[0]
    assert source.take_orders() == ((), ())


def test_a_follower_sends_finishes_and_reports_its_share(own: ScriptedSource) -> None:
    shares = Shares(own)
    shares.open(grant_of("a"))
    shares.send(part_of("a"), range(2))
    assert own.pushes[0].sent == [(range(2), 1, (7,))]
    shares.end(EndPush(0, None))
    assert shares.take_reports() == ()
    own.pushes[0].end()
    assert shares.take_reports() == (ENDED,)
    assert shares.take_reports() == ()


def test_a_follower_whose_share_fails_says_so_sends_no_more_and_aborts(
    own: ScriptedSource,
) -> None:
    shares = Shares(own)
    shares.open(grant_of("a"))
    own.pushes[0].broken = BROKEN
    shares.send(part_of("a"), range(1))
    shares.send(part_of("a"), range(1, 2))
    assert shares.take_reports() == (FAILED,)
    shares.end(EndPush(0, None))
    assert own.pushes[0].aborted is not None
    assert own.pushes[0].payload is None
    own.pushes[0].end()
    assert shares.take_reports() == (ENDED,)


@pytest.mark.parametrize(
    ("error", "warns"), [(BROKEN, True), (TransferAborted("the client hung up"), False)]
)
def test_a_follower_warns_of_a_fault_and_not_of_a_push_that_was_given_up(
    own: ScriptedSource, caplog: pytest.LogCaptureFixture, error: TransferError, warns: bool
) -> None:
    shares = Shares(own)
    shares.open(grant_of("a"))
    own.pushes[0].broken = error
    with caplog.at_level(logging.INFO):
        shares.send(part_of("a"), range(1))
    assert [record.levelno > logging.INFO for record in caplog.records] == [warns]
    assert shares.take_reports() == (FAILED,)


def test_a_follower_that_cannot_open_ends_its_share_all_the_same(own: ScriptedSource) -> None:
    own.refuses = True
    shares = Shares(own)
    shares.open(grant_of("a"))
    shares.send(part_of("a"), range(2))
    shares.end(EndPush(0, "the share failed"))
    assert shares.take_reports() == (FAILED, ENDED)


def test_a_follower_tells_at_most_a_rows_worth_at_once(own: ScriptedSource) -> None:
    shares = Shares(own)
    for number in range(REPORTS_PER_ROW + 3):
        shares.open(grant_of(str(number)))
        shares.end(EndPush(number, "cancelled"))
        own.pushes[number].end()
    assert [report.push for report in shares.take_reports()] == list(range(REPORTS_PER_ROW))
    assert len(shares.take_reports()) == 3


def test_a_follower_without_a_share_of_its_own_has_nothing_to_report() -> None:
    shares = Shares(None)
    shares.open(grant_of("a"))
    shares.send(part_of("a"), range(2))
    shares.end(EndPush(0, None))
    assert shares.take_reports() == ()
