"""Exchanges of experts between two ranks, so that the busiest has less to do.

Ranks that replicas join are level, and bear together what one of them is given; so an exchange is
judged by what it does to two such levels. Each one lowers the sum of squares of the ranks' loads,
or is undone: so it ends.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from engine.experts.holdings import Holdings

_MOST_ROUNDS = 200  # few tens are usual
_LEAST_GAIN = 2e-4  # of the mean; less is not worth an exchange
_ENOUGH = 0.25  # of the way to the least load; whoever finds that looks no further
_LEVEL = 1e-3  # of the mean; ranks whose loads differ by less are level
_MOST_FOR_PAIRS = 8  # experts on a rank: of more there are some that fit well enough alone

_Bundle = tuple[float, tuple[int, ...]]  # experts that leave a rank together, and their load


@dataclass(frozen=True, slots=True, kw_only=True)
class _Exchange:
    """``given`` leaves ``origin`` for ``target``, ``taken`` comes back."""

    origin: int
    target: int
    given: tuple[int, ...]
    taken: tuple[int, ...]

    @property
    def undone(self) -> "_Exchange":
        return _Exchange(origin=self.target, target=self.origin, given=self.given, taken=self.taken)


class Exchanges:
    """Lowers the busiest rank's load; nobody else changes the ``holdings`` meanwhile."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self._bundles_of: dict[int, list[_Bundle]] = {}  # of experts without other replicas
        self._pieces_of: dict[int, list[_Bundle]] = {}  # of those with others
        # By rank: a number for those that it is joined to, and how many of these are level with it.
        self._joined = [0] * holdings.num_ranks
        self._width = [1] * holdings.num_ranks
        self._look()

    def run(self, *, until: float) -> None:
        """Until the load is ``until`` times the mean, or cannot be lower."""
        loads, limit = self._holdings.loads, until * self._holdings.mean
        for _ in range(_MOST_ROUNDS):
            too_busy = [rank for rank, load in enumerate(loads) if load > limit]
            too_busy.sort(key=lambda rank: (-loads[rank], rank))
            if not [rank for rank in too_busy if loads[rank] > limit and self._improve(rank)]:
                return

    def _look(self) -> None:
        """Which ranks are level together."""
        loads, near = self._holdings.loads, _LEVEL * self._holdings.mean
        for ranks in self._holdings.joined():
            for rank in ranks:
                self._joined[rank] = ranks[0]
                self._width[rank] = sum(abs(loads[other] - loads[rank]) < near for other in ranks)

    def _improve(self, busy: int) -> bool:
        found = self._best(busy)
        if found is None:
            return False
        before = self._unevenness()
        self._do(found)
        if self._unevenness() < before:
            self._look()
            return True
        self._do(found.undone)
        return False

    def _unevenness(self) -> float:
        return sum(load * load for load in self._holdings.loads)

    def _do(self, exchange: _Exchange) -> None:
        holdings, origin, target = self._holdings, exchange.origin, exchange.target
        given = [(expert, holdings.take(expert, origin)) for expert in exchange.given]
        taken = [(expert, holdings.take(expert, target)) for expert in exchange.taken]
        for expert, amount in given:
            holdings.put(expert, target, amount)
        for expert, amount in taken:
            holdings.put(expert, origin, amount)
        holdings.level((origin, target))
        for rank in (origin, target):
            self._bundles_of.pop(rank, None)
        self._pieces_of.clear()  # levelling may have changed any

    def _best(self, busy: int) -> _Exchange | None:
        """What lowers the higher one of two levels much, where something lowers it at all."""
        return (
            self._fitting(busy, self._bundles, self._bundles, as_one=True)
            or self._fitting(busy, self._pieces, self._bundles, as_one=False)
            or self._fitting(busy, self._bundles, self._pieces, as_one=False)
        )

    def _fitting(
        self,
        busy: int,
        giving: Callable[[int], Sequence[_Bundle]],
        taking: Callable[[int], Sequence[_Bundle]],
        *,
        as_one: bool,
    ) -> _Exchange | None:
        """``as_one``: joined ranks bear it together. What a replica brings to a rank is not borne
        so: it is what its rank's level leaves it.
        """
        loads, high = self._holdings.loads, self._holdings.loads[busy]
        ranks = sorted(range(len(loads)), key=loads.__getitem__)
        best, lowest = None, high - _LEAST_GAIN * self._holdings.mean
        enough = high - (high - loads[ranks[0]]) * _ENOUGH
        for rank in ranks:
            self._holdings.pause()
            low = loads[rank]
            if low >= lowest or lowest <= enough:
                break
            here = there = 1
            if as_one and self._joined[rank] != self._joined[busy]:
                here, there = self._width[busy], self._width[rank]
            levelled = (high * here + low * there) / (here + there)
            if levelled >= lowest:
                continue
            wanted, taken_from = (levelled - low) * there, taking(rank)
            for amount, given in giving(busy):
                if amount <= 0:
                    continue
                for back, taken in _nearest(taken_from, amount - wanted):
                    less = amount - back
                    after = max(high - less / here, low + less / there)
                    if after >= lowest:
                        break  # those that follow are further away
                    if self._may_exchange(busy, given, rank, taken):
                        best = _Exchange(origin=busy, target=rank, given=given, taken=taken)
                        lowest = after
                        break
        return best

    def _may_exchange(
        self, origin: int, given: Sequence[int], target: int, taken: Sequence[int]
    ) -> bool:
        holdings, more = self._holdings, len(given) - len(taken)
        return (
            len(holdings.held[target]) + more <= holdings.slots_per_rank
            and len(holdings.held[origin]) - more <= holdings.slots_per_rank
            and all(holdings.may_move(expert, origin, target) for expert in given)
            and all(holdings.may_move(expert, target, origin) for expert in taken)
        )

    def _bundles(self, rank: int) -> list[_Bundle]:
        """None, one or two experts without other replicas, least load first."""
        found = self._bundles_of.get(rank)
        if found is None:
            held = self._holdings.held[rank]
            single = [
                (amount, (expert,))
                for expert, amount in held.items()
                if not self._holdings.is_replicated(expert)
            ]
            found = [(0.0, ()), *single]
            if len(held) <= _MOST_FOR_PAIRS:
                found += [(a + b, (*x, *y)) for (a, x), (b, y) in combinations(single, 2)]
            found.sort()
            self._bundles_of[rank] = found
        return found

    def _pieces(self, rank: int) -> list[_Bundle]:
        """One expert with other replicas, with what it brings to this rank now."""
        found = self._pieces_of.get(rank)
        if found is None:
            held = self._holdings.held[rank]
            found = sorted(
                (amount, (expert,))
                for expert, amount in held.items()
                if self._holdings.is_replicated(expert)
            )
            self._pieces_of[rank] = found
        return found


def _nearest(ascending: Sequence[_Bundle], wanted: float) -> Iterator[_Bundle]:
    """Those whose load is nearest to ``wanted`` first."""
    above = bisect_left(ascending, (wanted,))
    below = above - 1
    while below >= 0 or above < len(ascending):
        if above == len(ascending) or (
            below >= 0 and wanted - ascending[below][0] <= ascending[above][0] - wanted
        ):
            chosen, below = below, below - 1
        else:
            chosen, above = above, above + 1
        yield ascending[chosen]
