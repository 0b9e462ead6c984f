import pytest

from kvtransfer.interface import Committed, Fence, Quiet, TransferFailed
from kvtransfer.ledger import GrantLedger
from kvtransfer.plan import Chunk
from kvtransfer.shares import Share
from kvtransfer.steps import NOTHING, ConnectionId, Step
from protocol.errors import TransferAborted, TransferCorrupt, TransferError
from protocol.ids import AttemptRef, Generation, RequestId
from protocol.kv import Grant
from tests.support.transfers import LAYOUT, a_grant, a_worker

DECODE = a_worker()
ONE, TWO = ConnectionId(1), ConnectionId(2)
GENERATION = Generation(1)
WHOLE = Chunk(0, LAYOUT.num_layers, 0, 2)
LOST = TransferError("lost")


def a_ledger(**options: int) -> GrantLedger:
    return GrantLedger(worker=DECODE, layout=LAYOUT, num_blocks=8, **options)


def an_open_grant(fence: Fence = "receiver_checked") -> tuple[GrantLedger, Grant]:
    ledger, grant = a_ledger(), a_grant(DECODE, [5, 2])
    ledger.expect(grant)
    opened = ledger.bind(GENERATION, grant.ref, connection=ONE, fence=fence)
    assert [notice.kind for notice in opened.notices] == ["opened"]
    return ledger, grant


def fill(ledger: GrantLedger, chunk: Chunk = WHOLE, *, intact: bool = True) -> Step:
    blocks, _ = ledger.begin_chunk(GENERATION, chunk, connection=ONE)
    assert blocks is not None
    return ledger.end_chunk(GENERATION, chunk, intact=intact, connection=ONE)


def kinds(step: Step) -> list[type]:
    return [type(event) for event in step.events]


def said(step: Step) -> list[str]:
    return [notice.kind for notice in step.notices]


def test_all_pieces_and_the_finish_commit_the_grant() -> None:
    ledger, grant = an_open_grant()
    assert fill(ledger) == NOTHING
    step = ledger.finish(GENERATION, b"token", connection=ONE)
    assert step.events == (
        Committed(
            ref=grant.ref,
            generation=GENERATION,
            payload=b"token",
            bytes_received=2 * LAYOUT.block_bytes,
        ),
    )
    assert said(step) == ["committed"]
    assert ledger.num_live == 0


def test_a_chunk_is_given_the_pages_of_its_blocks() -> None:
    ledger, _ = an_open_grant()
    assert ledger.begin_chunk(GENERATION, Chunk(1, 1, 1, 1), connection=ONE)[0] == (2,)


def test_a_grant_of_no_blocks_commits_on_finish_alone() -> None:
    ledger, grant = a_ledger(), a_grant(DECODE, [])
    ledger.expect(grant)
    ledger.bind(GENERATION, grant.ref, connection=ONE, fence="one_sided")
    assert kinds(ledger.finish(GENERATION, b"", connection=ONE)) == [Committed]


def test_a_finish_before_the_last_chunk_fails_the_grant() -> None:
    ledger, _ = an_open_grant()
    fill(ledger, Chunk(0, 2, 0, 2))
    step = ledger.finish(GENERATION, b"", connection=ONE)
    assert kinds(step) == [TransferFailed, Quiet]
    assert said(step) == ["cancel"]


def test_a_damaged_chunk_fails_the_grant_as_corrupt() -> None:
    ledger, _ = an_open_grant()
    step = fill(ledger, intact=False)
    assert isinstance(step.events[0], TransferFailed)
    assert isinstance(step.events[0].error, TransferCorrupt)
    assert ledger.counts.corrupt == 1


def test_a_damaged_one_sided_grant_stays_quarantined_until_its_source_has_drained() -> None:
    ledger, _ = an_open_grant("one_sided")
    assert kinds(fill(ledger, intact=False)) == [TransferFailed]
    assert ledger.num_quarantined_blocks == 2
    assert kinds(ledger.source_stopped(GENERATION, LOST, connection=ONE)) == [Quiet]
    assert ledger.num_quarantined_blocks == 0


def test_an_unopened_grant_is_quiet_as_soon_as_it_is_aborted() -> None:
    ledger, grant = a_ledger(), a_grant(DECODE, [0])
    ledger.expect(grant)
    assert ledger.abort(grant) == Step(events=(Quiet(ref=grant.ref, generation=GENERATION),))


def test_an_abort_tells_who_fills_the_grant_that_nothing_is_at_fault() -> None:
    ledger, grant = an_open_grant()
    assert isinstance(ledger.abort(grant).notices[0].error, TransferAborted)
    other, _ = an_open_grant()
    assert not isinstance(fill(other, intact=False).notices[0].error, TransferAborted)


def test_an_abort_while_a_chunk_is_copied_waits_for_the_copy() -> None:
    ledger, grant = an_open_grant()
    ledger.begin_chunk(GENERATION, WHOLE, connection=ONE)
    step = ledger.abort(grant)
    assert (kinds(step), said(step)) == ([], ["cancel"])
    assert not ledger.may_copy(GENERATION)
    assert kinds(ledger.end_chunk(GENERATION, WHOLE, intact=True, connection=ONE)) == [Quiet]


def test_an_aborted_one_sided_grant_is_not_quiet_by_anything_but_proof() -> None:
    ledger, grant = an_open_grant("one_sided")
    assert kinds(ledger.abort(grant)) == []
    assert ledger.begin_chunk(GENERATION, WHOLE, connection=ONE) == (None, NOTHING)
    assert ledger.finish(GENERATION, b"", connection=ONE) == NOTHING
    assert ledger.abort(grant) == NOTHING
    assert ledger.source_stopped(GENERATION, LOST, connection=TWO) == NOTHING
    assert ledger.num_quarantined_blocks == 2
    assert kinds(ledger.connection_lost(ONE, LOST)) == [Quiet]


def test_a_lost_connection_fails_all_its_grants_and_no_other() -> None:
    ledger = a_ledger()
    for generation, connection in ((1, ONE), (2, ONE), (3, TWO)):
        grant = a_grant(DECODE, [generation], generation=generation)
        ledger.expect(grant)
        ledger.bind(grant.generation, grant.ref, connection=connection, fence="one_sided")
    step = ledger.connection_lost(ONE, LOST)
    assert kinds(step) == [TransferFailed, Quiet] * 2
    assert [event.generation for event in step.events] == [1, 1, 2, 2]
    assert ledger.num_live == 1


def test_an_abort_that_crosses_a_commit_is_answered_by_quiet_once() -> None:
    ledger, grant = an_open_grant()
    fill(ledger)
    ledger.finish(GENERATION, b"", connection=ONE)
    assert kinds(ledger.abort(grant)) == [Quiet]
    assert ledger.abort(grant) == NOTHING


def test_an_abort_before_expect_keeps_the_grant_closed() -> None:
    ledger, grant = a_ledger(), a_grant(DECODE, [0])
    assert kinds(ledger.abort(grant)) == [Quiet]
    ledger.expect(grant)
    step = ledger.bind(GENERATION, grant.ref, connection=ONE, fence="one_sided")
    assert said(step) == ["refused"]
    assert isinstance(step.notices[0].error, TransferAborted)
    assert ledger.counts.stale == 1


def test_an_unknown_grant_is_refused_and_its_chunks_are_dropped() -> None:
    ledger = a_ledger()
    ref = AttemptRef(RequestId("nobody"), 0)
    assert said(ledger.bind(GENERATION, ref, connection=ONE, fence="one_sided")) == ["refused"]
    assert ledger.begin_chunk(GENERATION, WHOLE, connection=ONE) == (None, NOTHING)
    assert ledger.finish(GENERATION, b"", connection=ONE) == NOTHING
    assert ledger.counts.unknown == 3


@pytest.mark.parametrize(
    "ref",
    [AttemptRef(RequestId("other"), 0), AttemptRef(RequestId("request"), 1)],
    ids=["other request", "other attempt"],
)
def test_a_grant_of_somebody_else_is_not_opened(ref: AttemptRef) -> None:
    ledger, grant = a_ledger(), a_grant(DECODE, [0])
    ledger.expect(grant)
    assert said(ledger.bind(GENERATION, ref, connection=ONE, fence="one_sided")) == ["refused"]
    assert said(ledger.bind(GENERATION, grant.ref, connection=ONE, fence="one_sided")) == ["opened"]


def test_a_grant_is_opened_by_one_connection_only() -> None:
    ledger, grant = an_open_grant()
    step = ledger.bind(GENERATION, grant.ref, connection=TWO, fence="one_sided")
    assert said(step) == ["refused"]
    assert ledger.begin_chunk(GENERATION, WHOLE, connection=TWO) == (None, NOTHING)
    assert ledger.finish(GENERATION, b"", connection=TWO) == NOTHING
    fill(ledger)


@pytest.mark.parametrize(
    "chunk",
    [Chunk(0, 1, 1, 2), Chunk(0, 1, 2, 1), Chunk(2, 2, 0, 1), Chunk(0, 0, 0, 1), Chunk(0, 1, 0, 0)],
    ids=["past the last block", "no such block", "past the last layer", "no layer", "no block"],
)
def test_a_chunk_outside_its_grant_fails_that_grant(chunk: Chunk) -> None:
    ledger, _ = an_open_grant()
    blocks, step = ledger.begin_chunk(GENERATION, chunk, connection=ONE)
    assert blocks is None
    assert kinds(step) == [TransferFailed, Quiet]


def test_a_repeated_chunk_is_not_written_again() -> None:
    ledger, _ = an_open_grant()
    fill(ledger)
    assert ledger.begin_chunk(GENERATION, Chunk(1, 1, 0, 2), connection=ONE) == (None, NOTHING)
    assert ledger.counts.duplicate_chunks == 1
    assert kinds(ledger.finish(GENERATION, b"", connection=ONE)) == [Committed]


def test_a_chunk_that_overlaps_another_fails_the_grant() -> None:
    ledger, _ = an_open_grant()
    fill(ledger, Chunk(0, 1, 0, 1))
    blocks, step = ledger.begin_chunk(GENERATION, Chunk(0, 1, 0, 2), connection=ONE)
    assert blocks is None
    assert kinds(step) == [TransferFailed, Quiet]


def test_what_comes_after_the_end_is_counted_and_does_nothing() -> None:
    ledger, _ = an_open_grant()
    fill(ledger)
    ledger.finish(GENERATION, b"", connection=ONE)
    assert ledger.begin_chunk(GENERATION, WHOLE, connection=ONE) == (None, NOTHING)
    assert ledger.finish(GENERATION, b"again", connection=ONE) == NOTHING
    assert ledger.source_stopped(GENERATION, LOST, connection=ONE) == NOTHING
    assert ledger.connection_lost(ONE, LOST) == NOTHING
    assert ledger.counts.stale == 3


def test_a_later_grant_of_the_same_blocks_is_closed_to_the_earlier_generation() -> None:
    ledger, grant = an_open_grant()
    ledger.abort(grant)
    later = a_grant(DECODE, [5, 2], generation=2)
    ledger.expect(later)
    ledger.bind(Generation(2), later.ref, connection=ONE, fence="receiver_checked")
    assert ledger.begin_chunk(GENERATION, WHOLE, connection=ONE) == (None, NOTHING)
    assert ledger.begin_chunk(Generation(2), WHOLE, connection=ONE)[0] == (5, 2)


@pytest.mark.parametrize(
    ("grant", "problem"),
    [
        (a_grant(a_worker(), [0]), "came to"),
        (a_grant(DECODE, [0, 0]), "twice"),
        (a_grant(DECODE, [8]), "granted block 8"),
    ],
    ids=["another incarnation", "one block twice", "block out of range"],
)
def test_a_grant_that_this_rank_cannot_have_made_is_a_bug(grant: Grant, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        a_ledger().expect(grant)


def test_tombstones_are_bounded() -> None:
    ledger = a_ledger(max_tombstones=3)
    for generation in range(1, 10):
        ledger.abort(a_grant(DECODE, [0], generation=generation))
    ledger.begin_chunk(Generation(1), WHOLE, connection=ONE)
    ledger.begin_chunk(Generation(9), WHOLE, connection=ONE)
    assert (ledger.counts.unknown, ledger.counts.stale) == (1, 1)


def a_grant_in_halves(fence: Fence = "receiver_checked") -> tuple[GrantLedger, Grant]:
    """Opened by two connections, which have half of the heads each."""
    ledger, grant = a_ledger(), a_grant(DECODE, [5, 2])
    ledger.expect(grant)
    for part, connection in enumerate((ONE, TWO)):
        ledger.bind(GENERATION, grant.ref, connection=connection, fence=fence, share=Share(part, 2))
    return ledger, grant


def fill_half(ledger: GrantLedger, connection: ConnectionId) -> None:
    assert ledger.begin_chunk(GENERATION, WHOLE, connection=connection)[0] is not None
    assert ledger.end_chunk(GENERATION, WHOLE, intact=True, connection=connection) == NOTHING


def test_a_grant_in_halves_commits_when_both_have_finished() -> None:
    ledger, _ = a_grant_in_halves()
    fill_half(ledger, ONE)
    assert ledger.finish(GENERATION, b"token", connection=ONE) == NOTHING
    fill_half(ledger, TWO)
    step = ledger.finish(GENERATION, b"", connection=TWO)
    (committed,) = step.events
    assert isinstance(committed, Committed)
    assert (committed.payload, committed.bytes_received) == (b"token", 2 * LAYOUT.block_bytes)
    assert [(n.kind, n.connection) for n in step.notices] == [
        ("committed", ONE),
        ("committed", TWO),
    ]


def test_a_grant_in_stages_takes_from_each_its_own_layers() -> None:
    ledger, grant = a_ledger(), a_grant(DECODE, [5, 2])
    ledger.expect(grant)
    for stage, connection in enumerate((ONE, TWO)):
        share = Share(stage=stage, stages=2)
        ledger.bind(GENERATION, grant.ref, connection=connection, fence="one_sided", share=share)
    half = LAYOUT.num_layers // 2
    later = Chunk(half, LAYOUT.num_layers - half, 0, 2)
    assert ledger.begin_chunk(GENERATION, later, connection=TWO)[0] == grant.block_ids
    ledger.end_chunk(GENERATION, later, intact=True, connection=TWO)
    assert ledger.finish(GENERATION, b"", connection=TWO) == NOTHING
    blocks, step = ledger.begin_chunk(GENERATION, later, connection=ONE)
    assert (blocks, kinds(step)) == (None, [TransferFailed])


def test_the_loss_of_one_half_fails_the_grant_and_is_no_proof_for_the_other() -> None:
    ledger, _ = a_grant_in_halves("one_sided")
    step = ledger.connection_lost(TWO, LOST)
    assert kinds(step) == [TransferFailed]
    assert [(n.kind, n.connection) for n in step.notices] == [("cancel", ONE)]
    assert kinds(ledger.source_stopped(GENERATION, LOST, connection=ONE)) == [Quiet]


def test_an_abort_of_a_grant_in_halves_is_quiet_when_both_are() -> None:
    ledger, grant = a_grant_in_halves("one_sided")
    assert said(ledger.abort(grant)) == ["cancel", "cancel"]
    assert ledger.source_stopped(GENERATION, LOST, connection=TWO) == NOTHING
    assert kinds(ledger.source_stopped(GENERATION, LOST, connection=ONE)) == [Quiet]


def test_a_half_that_comes_after_the_abort_is_refused() -> None:
    ledger, grant = a_ledger(), a_grant(DECODE, [5, 2])
    ledger.expect(grant)
    ledger.bind(GENERATION, grant.ref, connection=ONE, fence="one_sided", share=Share(0, 2))
    ledger.abort(grant)
    late = ledger.bind(GENERATION, grant.ref, connection=TWO, fence="one_sided", share=Share(1, 2))
    assert said(late) == ["refused"]
    assert isinstance(late.notices[0].error, TransferAborted)
    assert kinds(ledger.source_stopped(GENERATION, LOST, connection=ONE)) == [Quiet]


@pytest.mark.parametrize("share", [Share(0, 2), Share(1, 4), Share(0, 1), Share(1, 2, 0, 2)])
def test_a_part_twice_or_of_another_division_is_refused(share: Share) -> None:
    ledger, grant = a_ledger(), a_grant(DECODE, [5, 2])
    ledger.expect(grant)
    ledger.bind(GENERATION, grant.ref, connection=ONE, fence="one_sided", share=Share(0, 2))
    other = ledger.bind(GENERATION, grant.ref, connection=TWO, fence="one_sided", share=share)
    assert said(other) == ["refused"]
    assert ledger.counts.refused == 1


def test_a_finish_of_one_half_with_pieces_missing_fails_the_grant_for_both() -> None:
    ledger, _ = a_grant_in_halves()
    fill_half(ledger, ONE)
    ledger.finish(GENERATION, b"token", connection=ONE)
    step = ledger.finish(GENERATION, b"", connection=TWO)
    assert kinds(step) == [TransferFailed, Quiet]
    assert said(step) == ["cancel", "cancel"]
