"""How many replicas every expert should have.

Ranks that an expert fills have to fill their other slots too, with the lightest experts at best:
that tells how many ranks an expert needs for its ranks to stay below a limit, and the slots how
many there may be. Pure; which ranks these are is unknown here.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from itertools import accumulate

from protocol.errors import ConfigError

_HALVINGS = 30


def replicate(load: Sequence[float], num_ranks: int, slots_per_rank: int) -> list[int]:
    """Copies of each expert, at least one, at most one a rank: the largest share is the least
    possible. All slots are used, except where every expert is on every rank.

    Raises:
        ConfigError: the load is empty, negative or not finite, or the slots are too few.
    """
    _check(load, num_ranks, slots_per_rank)
    return _with_all_slots(load, [1] * len(load), num_ranks, slots_per_rank)


def replicate_to_fill(
    load: Sequence[float], num_ranks: int, slots_per_rank: int, pause: Callable[[], None]
) -> tuple[list[int], float]:
    """Copies of each expert, as ``replicate`` counts them, by what ranks hold beside it; and about
    the least max / mean that these slots allow. ``pause`` is called between small pieces of work.

    Raises:
        ConfigError: as ``replicate``.
    """
    _check(load, num_ranks, slots_per_rank)
    filling = _Filling(load, num_ranks, slots_per_rank)
    low, high = 1.0, filling.limit_without_replicas
    copies = filling.copies(low)
    if copies is not None:
        high = low
    while copies is None or high - low > 2**-_HALVINGS * filling.limit_without_replicas:
        pause()
        limit = (low + high) / 2
        found = filling.copies(limit)
        if found is None:
            low = limit
        else:
            copies, high = found, limit
    return _with_all_slots(load, copies, num_ranks, slots_per_rank), high


def may_reach(
    load: Sequence[float],
    copies: Sequence[int],
    num_ranks: int,
    slots_per_rank: int,
    max_over_mean: float,
) -> bool:
    """Whether so many copies leave a good chance to be that even. An estimate: replicas of light
    experts may also be there for nothing.
    """
    empty = num_ranks * slots_per_rank - sum(copies)
    filling = _Filling(load, num_ranks, slots_per_rank, empty=empty)
    return all(filling.fits(expert, count, max_over_mean) for expert, count in enumerate(copies))


class _Filling:
    """Loads over the mean of the ranks. ``empty`` slots stay so."""

    def __init__(
        self, load: Sequence[float], num_ranks: int, slots_per_rank: int, *, empty: int = 0
    ) -> None:
        mean = sum(load) / num_ranks or 1.0
        self._amounts = [amount / mean for amount in load]
        self._heaviest = sorted(range(len(load)), key=lambda expert: (-load[expert], expert))
        self._lightest = list(accumulate(sorted(self._amounts), initial=0.0))
        self._num_ranks = num_ranks
        self._slots_per_rank = slots_per_rank
        self._empty = empty

    @property
    def limit_without_replicas(self) -> float:
        return 1.0 + self._amounts[self._heaviest[0]] + self._beside(1)

    def fits(self, expert: int, count: int, limit: float) -> bool:
        return self._amounts[expert] + self._beside(count) <= limit * count * (1 + 1e-12)

    def copies(self, limit: float) -> list[int] | None:
        """The fewest with which no expert's ranks are above ``limit``; None: too many."""
        copies = [1] * len(self._amounts)
        left = self._num_ranks * self._slots_per_rank - len(copies)
        for expert in self._heaviest:
            if self.fits(expert, 1, limit):
                return copies  # and so do those that are lighter
            first = max(2, int(self._amounts[expert] / limit))
            counts = range(first, min(self._num_ranks, left + 1) + 1)
            count = next((count for count in counts if self.fits(expert, count, limit)), None)
            if count is None:
                return None
            copies[expert] = count
            left -= count - 1
        return copies

    def _beside(self, count: int) -> float:
        """What so many ranks have in their other slots at least."""
        others = (self._slots_per_rank - 1) * count - self._empty
        return self._lightest[max(0, min(others, len(self._amounts) - 1))]


def _check(load: Sequence[float], num_ranks: int, slots_per_rank: int) -> None:
    if not load or any(not math.isfinite(amount) or amount < 0 for amount in load):
        raise ConfigError("a load needs one finite number, at least 0, for every expert")
    if num_ranks * slots_per_rank < len(load):
        raise ConfigError(
            f"{len(load)} experts do not fit in {slots_per_rank} slots on each of {num_ranks} "
            f"ranks: at least {-(-len(load) // num_ranks)} slots are needed"
        )


def _with_all_slots(
    load: Sequence[float], copies: Sequence[int], num_ranks: int, slots_per_rank: int
) -> list[int]:
    """``copies`` and more, of the expert with the largest share each time."""
    counts = list(copies)
    left = num_ranks * slots_per_rank - sum(counts)
    shares = [
        (-amount / count, count, expert)
        for expert, (amount, count) in enumerate(zip(load, counts, strict=True))
    ]
    heapq.heapify(shares)
    while left and shares:
        _, count, expert = heapq.heappop(shares)
        if count == num_ranks:
            continue
        counts[expert] = count + 1
        left -= 1
        heapq.heappush(shares, (-load[expert] / (count + 1), count + 1, expert))
    return counts
