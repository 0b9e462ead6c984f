"""One attempt of a rank to come by a roll: from a lower rank, or by calling it."""

import secrets
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor

from engine.meeting.absences import Absences
from engine.meeting.doorman import Doorman
from engine.meeting.roll_call import Quorum, call, expected
from engine.meeting.tickets import Follow, Roll, Ticket
from engine.meeting.visit import answers, visit
from engine.meeting.waiting import Waiting
from protocol.errors import ConfigError, WorkerLost

_POLL_S = 0.02
_LEAD_S = 0.5  # then lower ranks are looked for again
_PROBES = 16
_LAST_WORDS_S = 1.0  # of the deadline are kept for telling why all must end
_MOST_REASONS = 4


class Gathering:
    """Used once. ``addresses`` are of all ranks that are known, and more are learnt."""

    def __init__(
        self,
        ticket: Ticket,
        *,
        doorman: Doorman,
        addresses: dict[int, str],
        quorum: Quorum,
        leaving: Collection[int],
        group: str,
        key: bytes,
        late_s: float,
        waiting: Waiting,
    ) -> None:
        """A rank that lives but does not come within ``late_s`` is gone for this group."""
        self._ticket = ticket
        self._doorman = doorman
        self._addresses = addresses
        self._quorum = quorum
        self._leaving = leaving
        self._group = group
        self._key = key
        self._late_s = late_s
        self._waiting = waiting
        self._gone = Absences()

    def roll(self, open_store: Callable[[], str]) -> Roll:
        """Called, or heard, and then this rank is on it. ``open_store`` is called by who leads.

        Raises:
            WorkerLost: another attempt is needed.
            DeadlineExceeded: from ``Waiting``.
            ConfigError: some rank cannot take part, and none has been in a group yet; all are told.
                Or it is this rank that does not fit in a group that has been.
        """
        self._doorman.seen()
        self._doorman.keep()
        while True:
            heard = self._look_below()
            if heard is not None:
                return self._mine(heard)
            members = self._lead()
            if members is not None:
                return self._call(members, open_store)

    def _look_below(self) -> Roll | None:
        """The roll of a lower rank; None where none answers."""
        for rank in sorted(self._addresses):
            if rank >= self._ticket.rank:
                break
            if self._lately_gone(rank) or rank in self._leaving:
                continue
            answer = self._visit(rank)
            if isinstance(answer, Follow):
                if self._lately_gone(answer.rank):
                    raise WorkerLost(f"rank {rank} still follows rank {answer.rank}, who is gone")
                self._addresses[answer.rank] = answer.address
                answer = self._visit(answer.rank)
            if isinstance(answer, Roll):
                return answer
        self._doorman.keep()
        return None

    def _visit(self, rank: int) -> Roll | Follow | None:
        heard_at = time.monotonic()

        def wait() -> None:
            nonlocal heard_at
            heard_at = time.monotonic()
            self._doorman.seen()
            self._doorman.send_on(rank, self._addresses[rank])
            self._waiting.check()

        self._doorman.seen()
        try:
            answer = visit(
                self._addresses[rank],
                self._ticket,
                group=self._group,
                key=self._key,
                on_wait=wait,
            )
        except WorkerLost as error:
            self._waiting.last_failure = f"rank {rank}: {error}"
            now = time.monotonic()
            self._gone.missed(rank, now=now, took_s=now - heard_at)
            self._doorman.keep()
            return None
        self._gone.found(rank)
        return answer

    def _lately_gone(self, rank: int) -> bool:
        return self._gone.lately(rank, now=time.monotonic())

    def _lead(self) -> tuple[int, ...] | None:
        """The members of the next group; None when it is time to look for lower ranks again."""
        if self._ticket.rank != 0 and not self._knows_a_group():
            self._waiting.pause(_LEAD_S / 5)  # nor will the others come: rank 0 leads the first one
            return None
        end = time.monotonic() + _LEAD_S
        while time.monotonic() < end:
            self._doorman.seen()
            self._settle_misfits()
            present = {**self._doorman.visitors, self._ticket.rank: self._ticket}
            members = call(present, quorum=self._quorum, gone=self._gone, leaving=self._leaving)
            if members is not None:
                return members
            known = expected(present)
            awaited = known or frozenset(range(self._quorum.ranks))
            missing = awaited - present.keys() - set(self._leaving)
            self._waiting.missing_ranks = tuple(sorted(missing))
            self._note_gone(missing & known)
            self._waiting.pause(_POLL_S)
        return None

    def _knows_a_group(self) -> bool:
        tickets = [self._ticket, *self._doorman.visitors.values()]
        return any(ticket.last_epoch for ticket in tickets)

    def _settle_misfits(self) -> None:
        """Before the first group one rank that does not fit in ends all, once all are there to hear
        it, or no more can be waited for. A group that has been is not ended by a rank that has not.
        """
        misfits = dict(self._doorman.misfits)
        if self._ticket.failure:
            own = f"rank {self._ticket.rank} cannot serve: {self._ticket.failure}"
            misfits[self._ticket.rank] = (self._ticket, own)
        if not misfits:
            return
        fitting = self._doorman.visitors
        reason = _told(reason for _, (_, reason) in sorted(misfits.items()))
        tickets = [*fitting.values(), *(ticket for ticket, _ in misfits.values())]
        if any(ticket.last_epoch for ticket in tickets):
            raise ConfigError(reason)  # theirs is the group, and this rank is new
        self._waiting.last_failure = reason
        present = misfits.keys() | fitting.keys() | {self._ticket.rank}
        if len(present) == self._quorum.ranks or self._waiting.left_s() < _LAST_WORDS_S:
            self._doorman.refuse(reason)
            raise ConfigError(reason)

    def _note_gone(self, missing: Iterable[int]) -> None:
        known = [r for r in missing if r in self._addresses and not self._lately_gone(r)]
        if not known:
            return
        with ThreadPoolExecutor(min(_PROBES, len(known))) as threads:
            looks = list(threads.map(self._look, known))
        late = self._waiting.waited_s() > self._late_s
        now = time.monotonic()
        for rank, (lives, took_s) in zip(known, looks, strict=True):
            # A lower rank that lives is visited, and does not have to come.
            if not lives or (late and rank > self._ticket.rank):
                self._gone.missed(rank, now=now, took_s=took_s)
            else:
                self._gone.found(rank)

    def _look(self, rank: int) -> tuple[bool, float]:
        """Whether it receives visitors, and how long it took to find out."""
        began = time.monotonic()
        lives = answers(self._addresses[rank], self._group)
        return lives, time.monotonic() - began

    def _call(self, members: tuple[int, ...], open_store: Callable[[], str]) -> Roll:
        present = {**self._doorman.visitors, self._ticket.rank: self._ticket}
        if not present.keys() >= set(members):
            raise WorkerLost("a rank left while the roll was called")
        tickets = [present[rank] for rank in members]
        roll = Roll(
            epoch=max(ticket.last_epoch for ticket in tickets) + 1,
            number=secrets.randbits(62),
            members=members,
            tickets=tuple(ticket.number for ticket in tickets),
            addresses=tuple(ticket.address for ticket in tickets),
            store=open_store() if len(members) > 1 else "",
        )
        self._doorman.call(roll)
        return roll

    def _mine(self, roll: Roll) -> Roll:
        if self._ticket.number not in roll.tickets:
            raise WorkerLost("another process has taken this rank's place")
        return roll


def _told(reasons: Iterable[str]) -> str:
    found = list(reasons)
    more = len(found) - _MOST_REASONS
    rest = [f"and {more} more ranks"] if more > 0 else []
    return "; ".join([*found[:_MOST_REASONS], *rest])
