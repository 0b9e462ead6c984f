"""Who waits while every decode rank is full: first come, first served, bounded.

Only the first in line tries again, and only when something has changed since its last try. A
request that finds nobody waiting does not join before it has been turned away once.
"""

from collections import deque
from collections.abc import Generator
from contextlib import contextmanager

from protocol.errors import Overloaded
from server.attempts import Attempt

RETRY_AFTER_S = 1.0


class WaitingLine:
    def __init__(self, *, capacity: int) -> None:
        self._capacity = capacity
        self._places: deque[Place] = deque()
        self.changes = 0

    @contextmanager
    def place(self, attempt: Attempt) -> "Generator[Place]":
        """A place for the duration of the block; leaving it lets the next in line try."""
        place = Place(self, attempt)
        try:
            yield place
        finally:
            self._leave(place)

    def changed(self) -> None:
        """A decode rank may have room now: let the first in line try."""
        self.changes += 1
        if self._places:
            self._places[0].attempt.wake()

    def __len__(self) -> int:
        return len(self._places)

    def is_first(self, place: "Place") -> bool:
        return self._places[0] is place

    def join(self, place: "Place") -> None:
        if len(self._places) >= self._capacity:
            raise Overloaded(
                f"every decode rank is full and {self._capacity} requests are waiting already",
                stage="queue",
                retry_after_s=RETRY_AFTER_S,
            )
        self._places.append(place)

    def _leave(self, place: "Place") -> None:
        if place not in self._places:
            return
        was_first = self.is_first(place)
        self._places.remove(place)
        if was_first and self._places:
            self._places[0].has_seen = -1  # whatever it has tried, others were before it
            self._places[0].attempt.wake()


class Place:
    """One request's standing. It joins the line at its second try, or if others wait before it."""

    def __init__(self, line: WaitingLine, attempt: Attempt) -> None:
        self._line = line
        self._joined = False
        self._tried = False
        self.attempt = attempt
        self.has_seen = -1

    async def turn(self) -> None:
        """Return when the request should try, once for each call.

        Raises:
            Overloaded: the line is full.
            ServingError: the attempt has failed meanwhile; its deadline is one reason.
        """
        self.attempt.raise_failure()
        if not self._joined and (self._tried or len(self._line)):
            self._line.join(self)
            self._joined = True
        while self._joined and not self._may_try():
            await self.attempt.changed()
            self.attempt.raise_failure()
        self._tried = True
        self.has_seen = self._line.changes

    def _may_try(self) -> bool:
        return self._line.is_first(self) and self.has_seen != self._line.changes
