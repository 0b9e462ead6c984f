"""Replicas on ranks: who holds what while a balanced placement is being looked for.

At every moment no rank holds an expert twice or more experts than it has slots, and replicas are
added and moved so that trays hold equally many of an expert as far as that can be. Ties are broken
by index, so equal input gives equal output. Why a rank should hold less is the balancer's business.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from engine.experts.placement import EMPTY, ExpertPlacement, Topology

_MOST_EXCHANGES = 10_000  # each one lowers the load of a busiest rank; few hundreds are usual
_LEAST_GAIN = 1e-9  # of the mean; less is rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class _Exchange:
    """``given`` leaves the busiest rank for ``rank``, ``taken`` comes back; EMPTY: nothing does."""

    rank: int
    given: int
    taken: int


class Packing:
    def __init__(
        self,
        load: Sequence[float],
        copies: Sequence[int],
        topology: Topology,
        slots_per_rank: int,
        pause: Callable[[], None],
    ) -> None:
        """``pause`` is called between small pieces of work: beside a thread that must not wait for
        Python's lock, it sleeps.
        """
        self._topology = topology
        self._slots_per_rank = slots_per_rank
        self._pause = pause
        self.copies = tuple(copies)
        self.num_ranks = topology.num_ranks
        self._share = [amount / count for amount, count in zip(load, copies, strict=True)]
        self._mean = sum(load) / topology.num_ranks
        self._held: list[list[int]] = [[] for _ in range(topology.num_ranks)]
        self._loads = [0.0] * topology.num_ranks
        self._in_tray: list[dict[int, int]] = [{} for _ in range(topology.num_trays)]

    @property
    def max_over_mean(self) -> float:
        return max(self._loads) / self._mean if self._mean else 1.0

    def heaviest_of_the_busiest(self) -> int:
        """The expert whose share is the largest on the rank with the most load."""
        held = self._held[self._busiest()]
        return max(held, key=lambda expert: (self._share[expert], -expert))

    def placement(self) -> ExpertPlacement:
        """Experts of a rank in ascending order."""
        return ExpertPlacement(
            len(self.copies),
            tuple(
                (*sorted(held), *[EMPTY] * (self._slots_per_rank - len(held)))
                for held in self._held
            ),
        )

    def adopt(self, current: ExpertPlacement) -> None:
        """Start from ``current``, with replicas taken from busy ranks and added to idle ones
        until every expert has its number of copies.
        """
        wanted = list(self.copies)
        for expert, slots in enumerate(current.replicas()):
            ranks = sorted(slot // current.slots_per_rank for slot in slots)
            for rank in ranks:
                self._put(expert, rank)
                wanted[expert] -= 1
        for expert, missing in enumerate(wanted):
            for _ in range(-missing):
                self._take(expert, self._most_dispensable(expert))
        self._place(expert for expert, missing in enumerate(wanted) for _ in range(missing))

    def place_all(self) -> None:
        self._place(expert for expert, count in enumerate(self.copies) for _ in range(count))

    def exchange(self, *, until: float) -> None:
        """Lower the busiest rank's load until it is ``until`` times the mean, or cannot be."""
        for _ in range(_MOST_EXCHANGES):
            self._pause()
            busiest = self._busiest()
            if self._loads[busiest] <= until * self._mean:
                return
            found = self._best_exchange(busiest)
            if found is None:
                return
            self._swap(busiest, found)

    def _place(self, replicas: Iterator[int]) -> None:
        """Heaviest first, each on the rank with the least load that may take it."""
        for expert in sorted(replicas, key=lambda expert: (-self._share[expert], expert)):
            self._pause()
            free = [rank for rank in range(len(self._held)) if self._has_room(rank)]
            fewest = self._fewest_in_a_tray(expert)
            fitting = [rank for rank in free if self._fits(expert, rank, fewest)]
            if fitting:
                self._put(expert, min(fitting, key=self._order))
            else:
                self._make_room(expert, free, fewest)

    def _make_room(self, expert: int, free: Sequence[int], fewest: int) -> None:
        """Every rank with room holds ``expert`` or has it in its tray: another rank takes it, and
        gives one of its own away. Failing that the tray takes one more than its share.
        """
        for target in sorted(range(len(self._held)), key=self._order):
            if not self._fits(expert, target, fewest):
                continue
            for moved in self._held[target]:
                fitting = (rank for rank in free if self._may_move(moved, target, rank))
                rank = next(fitting, None)
                if rank is not None:
                    self._take(moved, target)
                    self._put(moved, rank)
                    self._put(expert, target)
                    return
        open_ranks = [rank for rank in free if expert not in self._held[rank]]
        if open_ranks:
            self._put(expert, min(open_ranks, key=self._order))
            return
        # All ranks with room hold it. One without room does not, for an expert has at most one
        # copy a rank; being full, that rank holds something which one with room does not.
        rank = free[0]
        target = min(
            (other for other in range(len(self._held)) if expert not in self._held[other]),
            key=self._order,
        )
        moved = next(other for other in self._held[target] if other not in self._held[rank])
        self._take(moved, target)
        self._put(moved, rank)
        self._put(expert, target)

    def _best_exchange(self, busiest: int) -> _Exchange | None:
        high = self._loads[busiest]
        best, lowest = None, high - _LEAST_GAIN * self._mean
        for rank in sorted(range(len(self._loads)), key=self._order):
            gap = high - self._loads[rank]
            if rank == busiest or high - gap / 2 >= lowest:
                continue
            for given in self._held[busiest]:
                if not self._may_move(given, busiest, rank):
                    continue
                for taken in self._candidates(rank):
                    less = self._share[given] - (0.0 if taken == EMPTY else self._share[taken])
                    after = max(high - less, high - gap + less)
                    if (
                        0 < less < gap
                        and after < lowest
                        and (taken == EMPTY or self._may_move(taken, rank, busiest))
                    ):
                        best = _Exchange(rank=rank, given=given, taken=taken)
                        lowest = after
        return best

    def _candidates(self, rank: int) -> list[int]:
        held = self._held[rank]
        return [*held, EMPTY] if self._has_room(rank) else held

    def _swap(self, busiest: int, exchange: _Exchange) -> None:
        self._take(exchange.given, busiest)
        if exchange.taken != EMPTY:
            self._take(exchange.taken, exchange.rank)
            self._put(exchange.taken, busiest)
        self._put(exchange.given, exchange.rank)

    def _may_move(self, expert: int, origin: int, target: int) -> bool:
        if expert in self._held[target]:
            return False
        here, there = self._topology.tray_of(origin), self._topology.tray_of(target)
        return here == there or self._in_tray[there].get(expert, 0) < self._in_tray[here][expert]

    def _most_dispensable(self, expert: int) -> int:
        """The rank to take a replica from: in the fullest tray, then with the most load."""
        ranks = [rank for rank, held in enumerate(self._held) if expert in held]
        return max(
            ranks,
            key=lambda rank: (
                self._in_tray[self._topology.tray_of(rank)][expert],
                self._loads[rank],
                rank,
            ),
        )

    def _busiest(self) -> int:
        return max(range(len(self._loads)), key=self._loads.__getitem__)

    def _order(self, rank: int) -> tuple[float, int, int]:
        return self._loads[rank], len(self._held[rank]), rank

    def _has_room(self, rank: int) -> bool:
        return len(self._held[rank]) < self._slots_per_rank

    def _fits(self, expert: int, rank: int, fewest: int) -> bool:
        tray = self._in_tray[self._topology.tray_of(rank)]
        return expert not in self._held[rank] and tray.get(expert, 0) == fewest

    def _fewest_in_a_tray(self, expert: int) -> int:
        """Of the trays that have a rank without ``expert``."""
        return min(
            (
                tray.get(expert, 0)
                for index, tray in enumerate(self._in_tray)
                if tray.get(expert, 0) < len(self._topology.ranks_of(index))
            ),
        )

    def _put(self, expert: int, rank: int) -> None:
        tray = self._in_tray[self._topology.tray_of(rank)]
        tray[expert] = tray.get(expert, 0) + 1
        self._held[rank].append(expert)
        self._loads[rank] += self._share[expert]

    def _take(self, expert: int, rank: int) -> None:
        self._in_tray[self._topology.tray_of(rank)][expert] -= 1
        self._held[rank].remove(expert)
        self._loads[rank] -= self._share[expert]
