from collections.abc import Sequence

import anyio
import msgspec
import pytest

from protocol.errors import Overloaded
from protocol.ids import BlockId, Generation, WorkerId, WorkerRef, new_incarnation
from protocol.kv import Grant, KVEndpoint
from server.attempts import Attempt
from server.waiting_line import PREDICT_AFTER, Place, WaitingLine
from tests.support.arithmetic import a_request

RANK = WorkerRef(WorkerId("decode-0/0"), new_incarnation())


class StoppedClock:
    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)


def an_attempt(caller: str = "", *, priority: int = 0, deadline: float = 1e9) -> Attempt:
    request = msgspec.structs.replace(a_request(), caller=caller, priority=priority)
    return Attempt(request, deadline=deadline)


def grant_to(attempt: Attempt) -> None:
    attempt.grant = Grant(
        ref=attempt.ref,
        decode=RANK,
        generation=Generation(1),
        block_ids=(BlockId(0),),
        layout_digest="",
        endpoint=KVEndpoint(host_id="here", num_blocks=1, addresses={}),
        lease_s=1.0,
    )


def served_order(attempts: Sequence[Attempt], *, capacity: int = 100) -> list[str]:
    """Callers in the order in which they get their turn, all having joined before the first."""
    line = WaitingLine(capacity=capacity, clock=StoppedClock())
    places = [Place(line, attempt) for attempt in attempts]
    for place in places:
        line.join(place)
    order: list[str] = []
    while len(line):
        (first,) = (place for place in places if line.is_first(place))
        order.append(first.attempt.request.caller)
        grant_to(first.attempt)
        line._leave(first)
    return order


def test_requests_of_one_caller_are_served_as_they_came() -> None:
    attempts = [an_attempt() for _ in range(5)]
    line = WaitingLine(capacity=10, clock=StoppedClock())
    places = [Place(line, attempt) for attempt in attempts]
    for place in places:
        line.join(place)
    assert [p.attempt for p in sorted(places, key=lambda p: p.order)] == attempts


def test_a_caller_with_many_requests_does_not_hold_up_another() -> None:
    attempts = [*(an_attempt("many") for _ in range(6)), *(an_attempt("few") for _ in range(2))]
    assert served_order(attempts)[:4].count("few") == 2


def test_higher_priorities_go_first() -> None:
    attempts = [an_attempt("low", priority=-1), an_attempt("usual"), an_attempt("high", priority=5)]
    assert served_order(attempts) == ["high", "usual", "low"]


def test_a_full_line_refuses() -> None:
    line = WaitingLine(capacity=1, clock=StoppedClock())
    line.join(Place(line, an_attempt()))
    with pytest.raises(Overloaded) as refused:
        line.join(Place(line, an_attempt()))
    assert refused.value.retry_after_s == 1.0


def test_a_full_line_of_one_callers_requests_keeps_no_other_caller_out() -> None:
    line = WaitingLine(capacity=3, clock=StoppedClock())
    many = [Place(line, an_attempt("many")) for _ in range(3)]
    few = [Place(line, an_attempt("few")) for _ in range(2)]
    for place in (*many, few[0]):
        line.join(place)
    assert len(line) == 3
    with pytest.raises(Overloaded, match="3 requests are waiting"):
        many[2].attempt.raise_failure()
    with pytest.raises(Overloaded):
        line.join(Place(line, an_attempt("many")))
    with pytest.raises(Overloaded):  # an equal share of the line is all that others give way for
        line.join(few[1])
    for place in (*many[:2], few[0]):
        place.attempt.raise_failure()
    urgent = Place(line, an_attempt("many", priority=1))
    line.join(urgent)
    assert line.is_first(urgent)


def test_only_what_is_before_a_request_counts_for_how_long_it_would_wait() -> None:
    clock = StoppedClock()
    line = WaitingLine(capacity=100, clock=clock)
    places = [Place(line, an_attempt("many")) for _ in range(PREDICT_AFTER + 5)]
    for place in places:
        line.join(place)
    for place in places[:PREDICT_AFTER]:
        clock.time += 2.0
        grant_to(place.attempt)
        line._leave(place)
    with pytest.raises(Overloaded):
        line.join(Place(line, an_attempt("many", deadline=clock.time + 4.0)))
    line.join(Place(line, an_attempt("few", deadline=clock.time + 4.0)))


def test_a_request_that_would_wait_too_long_is_refused_with_the_time_to_come_back() -> None:
    clock = StoppedClock()
    line = WaitingLine(capacity=100, clock=clock)
    places = [Place(line, an_attempt()) for _ in range(PREDICT_AFTER + 3)]
    for place in places:
        line.join(place)
    for place in places[:PREDICT_AFTER]:
        clock.time += 2.0  # a turn takes two seconds
        grant_to(place.attempt)
        line._leave(place)
    assert line.predicted_wait_s == pytest.approx(6.0)
    with pytest.raises(Overloaded) as refused:
        line.join(Place(line, an_attempt(deadline=clock.time + 4.0)))
    assert refused.value.retry_after_s == pytest.approx(3.0)
    line.join(Place(line, an_attempt(deadline=clock.time + 7.0)))
    line.join(Place(line, an_attempt(priority=1, deadline=clock.time + 4.0)))


async def turns_of(places: Sequence[Place], tries: list[str], rounds: int) -> None:
    """Everybody tries in vain, ``rounds`` times; ``tries`` has who did, and whether behind."""

    async def try_forever(place: Place) -> None:
        while True:
            await place.turn()
            name = place.attempt.request.caller
            tries.append(f"{name} behind" if place.is_behind else name)

    async with anyio.create_task_group() as tasks:
        for place in places:
            tasks.start_soon(try_forever, place)
        await anyio.wait_all_tasks_blocked()
        tries.clear()
        for _ in range(rounds):
            places[0]._line.changed()
            await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()


def test_after_the_first_in_line_the_first_of_each_other_caller_tries() -> None:
    line = WaitingLine(capacity=10, clock=StoppedClock())
    places = [Place(line, an_attempt(caller)) for caller in ("many", "many", "many", "few")]
    for place in places:
        line.join(place)
        place._joined = True
    tries: list[str] = []
    anyio.run(turns_of, places, tries, 2)
    assert tries == ["many", "few behind", "many", "few behind"]


def test_of_one_callers_requests_only_the_first_in_line_tries() -> None:
    line = WaitingLine(capacity=10, clock=StoppedClock())
    places = [Place(line, an_attempt("many")) for _ in range(3)]
    for place in places:
        line.join(place)
        place._joined = True
    tries: list[str] = []
    anyio.run(turns_of, places, tries, 2)
    assert tries == ["many", "many"]


def test_changes_during_a_try_do_not_keep_the_next_from_trying() -> None:
    line = WaitingLine(capacity=10, clock=StoppedClock())
    first, second = (Place(line, an_attempt(caller)) for caller in ("a", "b"))
    for place in (first, second):
        line.join(place)
        place._joined = True
    assert line.has_turn(first)
    first.has_seen = line.changes
    line.changed()
    line.turned_away(first)
    assert line.has_turn(second)
    second.has_seen = line.changes
    line.turned_away(second)
    assert line.has_turn(first), "something has changed since its try"


def test_whoever_leaves_in_the_middle_of_a_try_lets_the_next_one_try() -> None:
    line = WaitingLine(capacity=10, clock=StoppedClock())
    first, second = (Place(line, an_attempt(caller)) for caller in ("a", "b"))
    for place in (first, second):
        line.join(place)
    assert line.has_turn(first)
    line._leave(first)
    assert line.has_turn(second)
    line._leave(second)
    assert len(line) == 0
