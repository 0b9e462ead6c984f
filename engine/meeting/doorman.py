"""Receives the ranks that come to this one, on threads of its own.

A visitor waits here until the engine thread calls the roll or follows a lower rank. In a group that
serves, whoever waits at its leader wants to join, and who does not fit in is sent away; before the
first one, that is everybody's concern, and the engine thread tells all. A rank whose engine thread
has not been seen for long receives nobody, so that nobody waits at a rank that will never call;
unless that thread waits for other ranks, which ends by itself: those who notice a loss first find
the others so. Who connects and does not say at once which rank it is gives way to those who come
later.
"""

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from engine.meeting.tickets import Follow, Refusal, Roll, Sealed, Ticket, Wait
from engine.meeting.visit import SILENT_S
from protocol.errors import WorkerLost
from runtime.log import get_log

log = get_log(__name__)

BEAT_S = 0.2
BACKLOG = 128
MOST_STRANGERS = 128  # connections that have not shown a ticket yet
TELLING_S = 2.0


@dataclass(slots=True, eq=False)
class _Visitor:
    ticket: Ticket
    misfit: str  # why it cannot be in a group with this rank; empty: it can
    answer: Follow | Roll | Refusal | None = None


class Doorman:
    def __init__(
        self,
        listener: socket.socket,
        *,
        group: str,
        role: str,
        rank: int,
        num_ranks: int,
        terms: Mapping[str, str],
        key: bytes,
        stuck_s: float,
        waited_until: Callable[[], float],
    ) -> None:
        """``listener`` is bound. Visitors of another ``group`` go away by themselves; those whose
        ``terms`` differ are misfits, and such as cannot come to ``rank`` of ``num_ranks`` are
        refused. After ``stuck_s`` without ``seen`` nobody is received. ``waited_until`` is when
        the engine thread last waited for other ranks, by the monotonic clock; infinite while it
        does.
        """
        listener.listen(BACKLOG)
        self._listener = listener
        self._group = group
        self._role = role
        self._rank = rank
        self._above = range(rank + 1, num_ranks)
        self._terms = dict(terms)
        self._key = key
        self._stuck_s = stuck_s
        self._waited_until = waited_until
        self._changed = threading.Condition()
        self._visitors: dict[int, _Visitor] = {}
        self._follow: Follow | None = None
        self._strangers: deque[socket.socket] = deque()
        self._formed = False
        self._closed = False
        self._seen_at = time.monotonic()
        threading.Thread(target=self._receive_all, name="doorman", daemon=True).start()

    # On the engine thread ------------------------------------------------------------------------

    def seen(self) -> None:
        """The engine thread is at work."""
        self._seen_at = time.monotonic()

    @property
    def visitors(self) -> Mapping[int, Ticket]:
        """Who waits here now, by rank; neither misfits nor who has had an answer and is about to
        go.
        """
        with self._changed:
            return {
                rank: visitor.ticket
                for rank, visitor in self._visitors.items()
                if visitor.answer is None and not visitor.misfit
            }

    @property
    def misfits(self) -> Mapping[int, tuple[Ticket, str]]:
        """Who waits here and cannot be in a group with this rank, and why; none once it is in
        one.
        """
        with self._changed:
            return {
                rank: (visitor.ticket, visitor.misfit)
                for rank, visitor in self._visitors.items()
                if visitor.answer is None and visitor.misfit
            }

    def formed(self) -> None:
        """This rank is in a group: from now on misfits are sent away, those that wait too."""
        self._formed = True
        with self._changed:
            for visitor in self._visitors.values():
                if visitor.misfit:
                    visitor.answer = Refusal(visitor.misfit)
            self._changed.notify_all()

    def keep(self) -> None:
        """From now on visitors wait here."""
        with self._changed:
            self._follow = None

    def send_on(self, rank: int, address: str) -> None:
        """From now on visitors are sent to ``rank``, and those who wait here too."""
        with self._changed:
            if self._follow is None or self._follow.rank != rank:
                self._follow = Follow(rank, address)
                for visitor in self._visitors.values():
                    visitor.answer = self._follow
                self._changed.notify_all()

    def call(self, roll: Roll) -> None:
        """Tell the roll to those who are on it. Others go on waiting."""
        with self._changed:
            for visitor in self._visitors.values():
                if visitor.ticket.number in roll.tickets:
                    visitor.answer = roll
            self._changed.notify_all()

    def refuse(self, reason: str) -> None:
        """Tell all who wait here; returns when they have heard it, or soon."""
        with self._changed:
            for visitor in self._visitors.values():
                visitor.answer = Refusal(reason)
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._visitors, timeout=TELLING_S)

    def close(self) -> None:
        """Receive nobody any more; who waits here finds the connection ended."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()

    # On threads of its own -----------------------------------------------------------------------

    def _receive_all(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            self._admit(connection)
            threading.Thread(
                target=self._receive, args=(connection,), name="visitor", daemon=True
            ).start()

    def _admit(self, connection: socket.socket) -> None:
        with self._changed:
            self._strangers.append(connection)
            oldest = self._strangers.popleft() if len(self._strangers) > MOST_STRANGERS else None
        if oldest is not None:
            with suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)  # wakes the thread that listens to it

    def _receive(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.settimeout(SILENT_S)
                sealed = Sealed(connection, group=self._group, key=self._key, host=True)
                ticket = self._greeted(sealed, connection)
                if ticket is None:
                    return
                misfit = self._misfit(ticket)
                if ticket.rank not in self._above:
                    reason = (
                        f"rank {ticket.rank} cannot come to rank {self._rank}: "
                        f"{self._role}.group.rank"
                    )
                    sealed.send(Refusal(f"{reason} must be one of 0 to {self._above.stop - 1}"))
                elif misfit and self._formed:
                    sealed.send(Refusal(misfit))
                else:
                    self._host(sealed, _Visitor(ticket, misfit))
            except WorkerLost as error:
                log.debug("a visitor has gone", reason=str(error))

    def _greeted(self, sealed: Sealed, connection: socket.socket) -> Ticket | None:
        try:
            if not self._receives():
                return None
            sealed.greet()
            return sealed.ticket()
        finally:
            with self._changed, suppress(ValueError):  # it may have been dropped
                self._strangers.remove(connection)

    def _host(self, sealed: Sealed, visitor: _Visitor) -> None:
        rank = visitor.ticket.rank
        with self._changed:
            visitor.answer = self._follow
            self._visitors[rank] = visitor  # in place of an earlier life of that rank
        try:
            while self._receives():
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._closed or visitor.answer is not None, timeout=BEAT_S
                    )
                    answer = visitor.answer
                sealed.send(Wait() if answer is None else answer)
                if answer is not None:
                    return
                sealed.ticket()
        finally:
            with self._changed:
                if self._visitors.get(rank) is visitor:
                    del self._visitors[rank]
                    self._changed.notify_all()

    def _misfit(self, ticket: Ticket) -> str:
        """Why the rank cannot be in a group with this one; empty if it can."""
        if ticket.failure:
            return f"rank {ticket.rank} cannot serve: {ticket.failure}"
        return "" if ticket.terms == self._terms else self._differences(ticket)

    def _differences(self, ticket: Ticket) -> str:
        ours, theirs = self._terms, ticket.terms
        parts = "; ".join(
            f"{name} is {theirs.get(name, 'absent')} on rank {ticket.rank}, "
            f"{ours.get(name, 'absent')} on rank {self._rank}"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        )
        return (
            f"rank {ticket.rank} cannot join the {self._role} ranks: {parts}; all ranks must be "
            "started with the same model, release and settings"
        )

    def _receives(self) -> bool:
        seen_at = max(self._seen_at, self._waited_until())
        return not self._closed and time.monotonic() - seen_at < self._stuck_s
