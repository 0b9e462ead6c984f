"""A rank that is gone is looked for again; the sooner, the less a look costs."""

from engine.meeting.absences import LEAST_S, TIMES, Absences


def test_who_was_missed_is_gone_until_found() -> None:
    gone = Absences()
    gone.missed(3, now=10.0, took_s=0.0)
    assert 3 in gone
    assert list(gone) == [3]
    gone.found(3)
    assert 3 not in gone
    assert not gone.lately(3, now=10.0)


def test_a_look_that_cost_nothing_is_soon_repeated() -> None:
    gone = Absences()
    gone.missed(3, now=10.0, took_s=0.001)
    assert gone.lately(3, now=10.0 + LEAST_S / 2)
    assert not gone.lately(3, now=10.0 + LEAST_S)


def test_looking_for_a_frozen_rank_takes_a_bounded_share_of_the_time() -> None:
    gone = Absences()
    gone.missed(3, now=10.0, took_s=1.0)
    assert gone.lately(3, now=10.0 + LEAST_S)
    assert not gone.lately(3, now=10.0 + TIMES)
    assert 3 in gone  # until somebody finds it


def test_who_was_never_missed_is_worth_a_look() -> None:
    assert not Absences().lately(3, now=0.0)
