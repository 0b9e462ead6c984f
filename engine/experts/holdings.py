"""Who holds which expert, and how much of its load, while a balanced placement is looked for.

At every moment no rank holds an expert twice or more experts than it has slots. What an expert's
replicas carry adds up to its load when ``level`` returns, and then no load could go from a rank to
one that has less. Equal input gives equal output. Who should hold what is unknown here.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from engine.experts.placement import EMPTY, ExpertPlacement, Topology, shares_by

_LEVEL = 5e-4  # of the mean; ranks whose loads differ by less are level
_MOST_POURS = 200  # of one expert; few tens are usual


class Holdings:
    """``held[rank][expert]`` is the load that the expert brings there, ``loads[rank]`` their sum,
    ``ranks_of[expert]`` who holds it. Written by ``put`` and ``take`` only.
    """

    def __init__(
        self,
        load: Sequence[float],
        topology: Topology,
        slots_per_rank: int,
        pause: Callable[[], None],
    ) -> None:
        """``pause`` is called between small pieces of work: beside a thread that must not wait for
        Python's lock, it sleeps.
        """
        self.load = load
        self.topology = topology
        self.slots_per_rank = slots_per_rank
        self.pause = pause
        self.mean = sum(load) / topology.num_ranks
        self.held: list[dict[int, float]] = [{} for _ in range(topology.num_ranks)]
        self.loads = [0.0] * topology.num_ranks
        self.ranks_of: list[list[int]] = [[] for _ in load]
        self._tray_of = [topology.tray_of(rank) for rank in range(topology.num_ranks)]
        self._ranks_in = Counter(self._tray_of)
        self._in_tray: dict[int, dict[int, int]] = {tray: {} for tray in self._ranks_in}

    @property
    def num_ranks(self) -> int:
        return len(self.loads)

    @property
    def max_over_mean(self) -> float:
        return max(self.loads) / self.mean if self.mean else 1.0

    def placement(self) -> ExpertPlacement:
        """Experts of a rank in ascending order."""
        slots, weights = [], []
        for held in self.held:
            unused = self.slots_per_rank - len(held)
            slots.append((*sorted(held), *[EMPTY] * unused))
            weights.append((*(held[expert] for expert in sorted(held)), *[0.0] * unused))
        return ExpertPlacement(len(self.load), tuple(slots), shares_by(slots, weights))

    def put(self, expert: int, rank: int, amount: float = 0.0) -> None:
        tray = self._in_tray[self._tray_of[rank]]
        tray[expert] = tray.get(expert, 0) + 1
        self.ranks_of[expert].append(rank)
        self.held[rank][expert] = amount
        self.loads[rank] += amount

    def take(self, expert: int, rank: int) -> float:
        """What it carried there, which nobody carries now."""
        self._in_tray[self._tray_of[rank]][expert] -= 1
        self.ranks_of[expert].remove(rank)
        amount = self.held[rank].pop(expert)
        self.loads[rank] -= amount
        return amount

    def share_evenly(self, expert: int) -> None:
        ranks = self.ranks_of[expert]
        for rank in ranks:
            self._carry(expert, rank, self.load[expert] / len(ranks))

    def level(self, ranks: Iterable[int]) -> None:
        """Let replicas share until no load could go from a rank to one with less.

        Pouring one expert after another over its ranks lowers the sum of squares of all loads,
        which is convex; so it ends where no load can be lower. ``ranks`` are those that have
        changed.
        """
        waiting = dict.fromkeys(
            expert for rank in ranks for expert in self.held[rank] if self.is_replicated(expert)
        )
        poured = dict.fromkeys(range(len(self.load)), 0)
        while waiting:
            self.pause()
            expert = next(iter(waiting))
            del waiting[expert]
            poured[expert] += 1
            for rank in self._pour(expert):
                waiting |= {
                    other: None
                    for other in self.held[rank]
                    if other != expert and self.is_replicated(other) and poured[other] < _MOST_POURS
                }

    def joined(self) -> list[list[int]]:
        """Ranks by what joins them: replicas of one expert, and of another one on one of these."""
        found: list[list[int]] = []
        seen: set[int] = set()
        for first in range(self.num_ranks):
            if first in seen:
                continue
            seen.add(first)
            ranks = [first]
            for rank in ranks:  # which grows
                for expert in self.held[rank]:
                    if self.is_replicated(expert):
                        new = [other for other in self.ranks_of[expert] if other not in seen]
                        seen.update(new)
                        ranks += new
            found.append(ranks)
        return found

    def is_replicated(self, expert: int) -> bool:
        return len(self.ranks_of[expert]) > 1

    def has_room(self, rank: int) -> bool:
        return len(self.held[rank]) < self.slots_per_rank

    def order(self, rank: int) -> tuple[float, int, int]:
        """Least load first, then fewest experts."""
        return self.loads[rank], len(self.held[rank]), rank

    def may_move(self, expert: int, origin: int, target: int) -> bool:
        """Without its replicas being in fewer trays than they are."""
        if expert in self.held[target]:
            return False
        here, there = self._tray_of[origin], self._tray_of[target]
        return here == there or self._in_tray[there].get(expert, 0) < self._in_tray[here][expert]

    def may_take(self, expert: int, rank: int, fewest: int) -> bool:
        """``fewest`` is of ``fewest_in_a_tray``; slots are not looked at."""
        tray = self._in_tray[self._tray_of[rank]]
        return tray.get(expert, 0) == fewest and expert not in self.held[rank]

    def fewest_in_a_tray(self, expert: int) -> int:
        """Of the trays that have a rank without ``expert``."""
        return min(
            of_tray.get(expert, 0)
            for tray, of_tray in self._in_tray.items()
            if of_tray.get(expert, 0) < self._ranks_in[tray]
        )

    def most_dispensable(self, expert: int) -> int:
        """The rank to take a replica from: in the fullest tray, then with the most load."""
        return max(
            self.ranks_of[expert],
            key=lambda rank: (self._in_tray[self._tray_of[rank]][expert], self.loads[rank], rank),
        )

    def _pour(self, expert: int) -> list[int]:
        """Fill the expert's ranks up to one level, lowest first; those whose load has changed."""
        held, loads, ranks = self.held, self.loads, self.ranks_of[expert]
        others = sorted([(loads[rank] - held[rank][expert], rank) for rank in ranks])
        poured, level = self.load[expert], 0.0
        for count, (carried, _) in enumerate(others, start=1):
            poured += carried
            level = poured / count
            if count < len(others) and level <= others[count][0]:
                break
        changed = []
        for carried, rank in others:
            amount = max(0.0, level - carried)
            if abs(amount - held[rank][expert]) > _LEVEL * self.mean:
                changed.append(rank)
            held[rank][expert] = amount
            loads[rank] = carried + amount
        return changed

    def _carry(self, expert: int, rank: int, amount: float) -> None:
        self.loads[rank] += amount - self.held[rank][expert]
        self.held[rank][expert] = amount
