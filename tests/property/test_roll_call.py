"""A leader calls the roll neither too early, so that a group falls apart, nor never."""

from hypothesis import given
from hypothesis import strategies as st

from engine.meeting.roll_call import Quorum, call, expected
from engine.meeting.tickets import Ticket

SEATS = 6


def ticket(rank: int, last_epoch: int = 0, last_members: tuple[int, ...] = ()) -> Ticket:
    return Ticket(
        rank=rank,
        number=rank + 100,
        address="",
        last_epoch=last_epoch,
        last_members=last_members,
        terms={},
    )


ranks = st.sets(st.integers(0, SEATS - 1))
quorums = st.builds(
    Quorum, ranks=st.just(SEATS), first=st.integers(1, SEATS), least=st.integers(1, SEATS)
)


@given(quorums, ranks, ranks.filter(bool), ranks, ranks)
def test_members_are_enough_and_nobody_who_lives_is_left_behind(
    quorum: Quorum, before: set[int], there: set[int], gone: set[int], leaving: set[int]
) -> None:
    present = {
        rank: ticket(rank, 3, tuple(sorted(before))) if rank in before else ticket(rank)
        for rank in there
    }
    members = call(present, quorum=quorum, gone=gone, leaving=leaving)

    if members is None:
        return
    assert set(members) == there - leaving
    assert len(members) >= quorum.least
    assert expected(present) - gone - leaving <= set(members) or len(members) == SEATS - len(
        leaving
    )


@given(quorums, ranks.filter(bool), ranks)
def test_when_all_others_are_gone_enough_ranks_go_on(
    quorum: Quorum, before: set[int], there: set[int]
) -> None:
    present = {rank: ticket(rank, 3, tuple(sorted(before))) for rank in there & before}
    if len(present) < quorum.least or not present:
        return
    gone = before - there
    assert call(present, quorum=quorum, gone=gone, leaving=()) == tuple(sorted(present))


def test_at_the_first_meeting_as_many_are_waited_for_as_was_agreed() -> None:
    quorum = Quorum(ranks=4, first=3, least=2)
    two = {rank: ticket(rank) for rank in (0, 2)}
    assert call(two, quorum=quorum, gone=(1, 3), leaving=()) is None
    assert call({**two, 3: ticket(3)}, quorum=quorum, gone=(), leaving=()) == (0, 2, 3)


def test_a_newcomer_is_taken_along_and_not_waited_for() -> None:
    quorum = Quorum(ranks=4, first=4, least=2)
    left = {rank: ticket(rank, 5, (0, 1, 2)) for rank in (0, 1, 2)}
    assert call(left, quorum=quorum, gone=(), leaving=()) == (0, 1, 2)
    assert call({**left, 3: ticket(3)}, quorum=quorum, gone=(), leaving=()) == (0, 1, 2, 3)


def test_a_rank_that_is_late_is_waited_for_until_it_is_known_to_be_gone() -> None:
    quorum = Quorum(ranks=4, first=4, least=2)
    left = {rank: ticket(rank, 5, (0, 1, 2, 3)) for rank in (0, 1)}
    assert call(left, quorum=quorum, gone=(2,), leaving=()) is None
    assert call(left, quorum=quorum, gone=(2,), leaving=(3,)) == (0, 1)
