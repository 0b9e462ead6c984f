"""When a rank that leads a meeting calls the roll, and who is on it. Pure."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from engine.meeting.tickets import Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class Quorum:
    """How many it takes: ``ranks`` in all, ``first`` of them at the first meeting, ``least`` of
    them ever after.
    """

    ranks: int
    first: int
    least: int


def expected(present: Mapping[int, Ticket]) -> frozenset[int]:
    """Who was in the latest group of which anybody present knows; empty before the first one."""
    latest = max(ticket.last_epoch for ticket in present.values())
    return frozenset(
        rank
        for ticket in present.values()
        if ticket.last_epoch == latest
        for rank in ticket.last_members
    )


def call(
    present: Mapping[int, Ticket],
    *,
    quorum: Quorum,
    gone: Collection[int],
    leaving: Collection[int],
) -> tuple[int, ...] | None:
    """The members of the next group, or None while it is worth waiting.

    ``gone`` are ranks that are known not to come, dead or frozen; ``leaving`` have said goodbye.
    The latest group's other ranks are waited for, so that it does not fall apart because one is
    late; ranks that are new are taken along if they are there, and not waited for.
    """
    members = tuple(sorted(set(present) - set(leaving)))
    if len(members) < quorum.least:
        return None
    if len(members) == quorum.ranks - len(set(leaving)):
        return members
    known = expected(present)
    if not known:
        return members if len(members) >= quorum.first else None
    awaited = known - set(members) - set(gone) - set(leaving)
    return None if awaited else members
