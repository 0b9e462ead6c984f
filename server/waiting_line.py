"""Who waits while every decode rank is full: a bounded line, in the order of priority and fairness.

Only one tries at a time, and only when something has changed since its last try: the first in
line, and when it has been turned away the first of each other caller, for which those that hold
more than their part of a rank may have to give way. A request that finds nobody waiting does not
join before it has been turned away once.

Among equal priorities callers share what becomes free: each place has a virtual time, its caller's
last one plus the work it asks for, and the smallest goes first, so one caller's thousand requests
delay another's first one by one request. Source: Demers, Keshav and Shenker, "Analysis and
simulation of a fair queueing algorithm", SIGCOMM 1989.

A request that would wait longer than it may is refused at once, with the time to come back after.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from operator import attrgetter

from protocol.errors import Overloaded
from runtime.clock import Clock
from server.attempts import Attempt

RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 60.0
SMOOTHING = 0.1
PREDICT_AFTER = 8  # places served, before predictions count

_order = attrgetter("order")


class WaitingLine:
    def __init__(self, *, capacity: int, clock: Clock) -> None:
        self._capacity = capacity
        self._clock = clock
        self._places: list[Place] = []  # by ``order``
        self._virtual_time = 0.0
        self._last_of_caller: dict[str, float] = {}
        self._waiting_of_caller: Counter[str] = Counter()
        self._trying: Place | None = None
        self._round = 0  # the change that those who wait are told of, one after another
        self._joined = 0
        self._served = 0
        self._served_at = 0.0
        self._seconds_per_token = 0.0  # smoothed, of work that got its turn while others waited
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
        """A decode rank may have room now: let those in line try, one after another."""
        self.changes += 1
        self._offer()

    def __len__(self) -> int:
        return len(self._places)

    def has_turn(self, place: "Place") -> bool:
        return self._trying is place

    def turned_away(self, place: "Place") -> None:
        """``place`` has tried in vain, and the next may."""
        if self._trying is place:
            self._trying = None
        self._offer()

    def _offer(self) -> None:
        """Wake whoever may try next, unless somebody does."""
        if self._trying is not None:
            return
        self._trying = self._next_in_round()
        if self._trying is None and self._round != self.changes:
            self._round = self.changes
            self._trying = self._next_in_round()
        if self._trying is not None:
            self._trying.attempt.wake()

    def _next_in_round(self) -> "Place | None":
        """The first of each caller, in order, until one of them has not tried in this round."""
        seen: set[str] = set()
        for place in self._places:
            caller = place.attempt.request.caller
            if caller not in seen:
                if place.has_seen < self._round:
                    return place
                seen.add(caller)
                if len(seen) == len(self._waiting_of_caller):
                    break
        return None

    def is_first(self, place: "Place") -> bool:
        return self._places[0] is place

    def join(self, place: "Place") -> None:
        """Stand behind those whose turn is before the request's. Where the line is full the last
        one of all is refused, so that one caller's requests keep no other caller out.

        Raises:
            Overloaded: that is this one, or those before it take longer than it has time.
        """
        if not self._places:
            self._last_of_caller.clear()
            self._served_at = self._clock.now()
        request = place.attempt.request
        begins = max(self._virtual_time, self._last_of_caller.get(request.caller, 0.0))
        place.order = (-request.priority, begins + request.max_total_tokens, self._joined)
        before = self._places[: bisect_left(self._places, place.order, key=_order)]
        wait_s = self._predicted_s(before)
        left_s = place.attempt.deadline - self._clock.now()
        if request.priority <= 0 and wait_s > left_s:
            raise Overloaded(
                "the requests that wait already will take longer than this one may",
                stage="queue",
                retry_after_s=min(MAX_RETRY_AFTER_S, wait_s - left_s + RETRY_AFTER_S),
            )
        if len(self._places) >= self._capacity:
            full = Overloaded(
                f"no decode rank has room and {self._capacity} requests are waiting already",
                stage="queue",
                retry_after_s=min(MAX_RETRY_AFTER_S, max(RETRY_AFTER_S, self.predicted_wait_s)),
            )
            if len(before) == len(self._places) or len(self._places) == 1:
                raise full  # the only one, which is the first, may be getting its room just now
            self._send_away(self._places[-1], full)
        self._last_of_caller[request.caller] = place.order[1]
        self._joined += 1
        insort(self._places, place, key=_order)
        self._waiting_of_caller[request.caller] += 1
        self._offer()

    def _send_away(self, last: "Place", why: Overloaded) -> None:
        """Its caller is not charged for work that is not done."""
        request = last.attempt.request
        if self._last_of_caller.get(request.caller) == last.order[1]:
            self._last_of_caller[request.caller] = last.order[1] - request.max_total_tokens
        self._remove(last)
        last.attempt.fail(why)

    def _remove(self, place: "Place") -> None:
        self._places.remove(place)
        caller = place.attempt.request.caller
        self._waiting_of_caller[caller] -= 1
        if not self._waiting_of_caller[caller]:
            del self._waiting_of_caller[caller]
        if self._trying is place:
            self._trying = None

    @property
    def predicted_wait_s(self) -> float:
        """Until everybody who waits now has had their turn; 0 while nothing is known of that."""
        return self._predicted_s(self._places)

    def _predicted_s(self, places: Sequence["Place"]) -> float:
        if self._served < PREDICT_AFTER:
            return 0.0
        work = sum(place.attempt.request.max_total_tokens for place in places)
        return work * self._seconds_per_token

    def _note_served(self, place: "Place") -> None:
        """How fast the line moves: time since the one before, over the work of this one."""
        now = self._clock.now()
        pace = (now - self._served_at) / place.attempt.request.max_total_tokens
        weight = 1.0 if self._served == 0 else SMOOTHING
        self._seconds_per_token += weight * (pace - self._seconds_per_token)
        self._served += 1
        self._served_at = now
        self._virtual_time = max(self._virtual_time, place.order[1])

    def _leave(self, place: "Place") -> None:
        if place not in self._places:
            return
        was_first = self.is_first(place)
        self._remove(place)
        if place.attempt.grant is not None:
            self._note_served(place)
        if was_first and self._places:
            self._places[0].has_seen = -1  # whatever it has tried, others were before it
        self._offer()


class Place:
    """One request's standing. It joins the line at its second try, or if others wait before it."""

    def __init__(self, line: WaitingLine, attempt: Attempt) -> None:
        self._line = line
        self._joined = False
        self._tried = False
        self.attempt = attempt
        self.has_seen = -1
        self.order = (0, 0.0, 0)

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
        elif self._joined:
            self._line.turned_away(self)
        while self._joined and not self._line.has_turn(self):
            await self.attempt.changed()
            self.attempt.raise_failure()
        self._tried = True
        self.has_seen = self._line.changes

    @property
    def is_behind(self) -> bool:
        """Others wait before it, for whatever becomes free."""
        return self._joined and not self._line.is_first(self)
