"""Which experts get further replicas, which ranks hold what, and which share of an expert's tokens
each replica gets, so that ranks do equal work.

Replicas need not get equal shares: ranks that replicas join can carry together whatever they hold.
So a heavy expert gets as many ranks as its load and the lightest experts beside it fill; the others
are packed into what is left, heaviest first; experts are exchanged between the busiest rank and the
others while that helps; and shares are poured until the ranks are level. Pure: ranks that start
with the same recorded load place alike. How load is counted and how experts move is unknown here.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from engine.experts.exchanges import Exchanges
from engine.experts.holdings import Holdings
from engine.experts.packing import adopt, pack
from engine.experts.placement import (
    EMPTY,
    WHOLE,
    ExpertPlacement,
    Topology,
    keeping_slots,
    moves,
    shared_trays,
)
from protocol.errors import ConfigError

Mode = Literal["global", "hierarchical"]

WORTH_MOVING = 0.01  # of the mean: what gains less is not worth further moves
_NEAR_ENOUGH = 0.001  # of the mean: what gains less is not worth further search
_HALVINGS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """How evenly a placement spreads a load over the ranks. 1 is perfect everywhere."""

    max_over_mean: float
    bound: float  # no placement on as many slots has a lower ``max_over_mean``

    @property
    def balancedness(self) -> float:
        return 1 / self.max_over_mean


def _at_once() -> None:
    """Nobody waits for the lock that this thread holds."""


def balance(
    load: Sequence[float],
    topology: Topology,
    slots_per_rank: int,
    *,
    mode: Mode = "global",
    pause: Callable[[], None] = _at_once,
) -> ExpertPlacement:
    """The most even placement that we know how to find, with every slot in use if it can be.

    ``load[e]`` is in any unit. ``hierarchical`` also keeps replicas of an expert in as many trays
    as there are; ``global`` knows only ranks and balances a little better. ``pause`` is called
    between small pieces of work.

    Raises:
        ConfigError: the load is empty, negative or not finite, or the slots are too few.
    """
    least, copies = _least_and_copies(load, topology.num_ranks, slots_per_rank, pause)
    holdings = Holdings(load, _domains(topology, mode), slots_per_rank, pause)
    pack(holdings, copies)
    Exchanges(holdings).run(until=least + _NEAR_ENOUGH)
    return _not_worse_than_evenly(load, holdings.placement())


def rebalance(
    load: Sequence[float],
    current: ExpertPlacement,
    topology: Topology,
    *,
    mode: Mode = "global",
    pause: Callable[[], None] = _at_once,
) -> ExpertPlacement:
    """A placement nearly as even as ``balance`` finds, as few moves away from ``current`` as we
    know how to find. An expert that stays on a rank stays in its slot. ``pause`` as for
    ``balance``.

    Raises:
        ConfigError: as ``balance``, or the load is of another number of experts or ranks.
    """
    if len(load) != current.num_experts or topology.num_ranks != current.num_ranks:
        raise ConfigError(
            f"a load of {len(load)} experts on {topology.num_ranks} ranks does not fit a placement "
            f"of {current.num_experts} experts on {current.num_ranks} ranks"
        )
    domains = _domains(topology, mode)
    spread = shared_trays(current, domains) == _least_shared(current, domains)
    even = balance_of(load, current).max_over_mean <= 1 + WORTH_MOVING
    if even and spread and not leaves_idle(current):
        return current
    best = balance(load, topology, current.slots_per_rank, mode=mode, pause=pause)
    goal = balance_of(load, best).max_over_mean + WORTH_MOVING
    shared = shared_trays(best, domains)

    def suffices(placement: ExpertPlacement) -> bool:
        return (
            balance_of(load, placement).max_over_mean <= goal
            and shared_trays(placement, domains) <= shared
            and not leaves_idle(placement)
        )

    def near(copies: Sequence[int]) -> ExpertPlacement:
        holdings = Holdings(load, domains, current.slots_per_rank, pause)
        adopt(holdings, current, copies)
        Exchanges(holdings).run(until=goal)
        return keeping_slots(current, holdings.placement())

    if suffices(current):
        return current
    same_slots = level(load, current, pause=pause)
    if suffices(same_slots):
        return same_slots
    found = [keeping_slots(current, best)]
    for placement in (current, best):
        found.append(near([len(slots) for slots in placement.replicas()]))
        if suffices(found[-1]):
            break
    return min(filter(suffices, found), key=lambda placement: moves(current, placement))


def level(
    load: Sequence[float],
    placement: ExpertPlacement,
    *,
    pause: Callable[[], None] = _at_once,
) -> ExpertPlacement:
    """``placement`` with the shares that let its ranks be as even as these slots allow. Nothing
    moves. ``pause`` as for ``balance``.
    """
    holdings = Holdings(load, Topology(placement.num_ranks), placement.slots_per_rank, pause)
    adopt(holdings, placement, [len(slots) for slots in placement.replicas()])
    return _not_worse_than_evenly(load, keeping_slots(placement, holdings.placement()))


def leaves_idle(placement: ExpertPlacement) -> bool:
    """Whether a rank holds nothing, as one does that has just come."""
    return any(set(held) == {EMPTY} for held in placement.slots)


def balance_of(load: Sequence[float], placement: ExpertPlacement) -> Balance:
    """How even ``placement`` is under ``load``; perfect where there is no load."""
    loads = rank_loads(load, placement)
    mean = sum(loads) / len(loads)
    if mean == 0:
        return Balance(max_over_mean=1.0, bound=1.0)
    copies = replicate(load, placement.num_ranks, placement.slots_per_rank)
    largest = max(amount / count for amount, count in zip(load, copies, strict=True))
    return Balance(max_over_mean=max(loads) / mean, bound=max(1.0, largest / mean))


def rank_loads(load: Sequence[float], placement: ExpertPlacement) -> list[float]:
    """What each rank carries by the shares of its slots."""
    return [
        sum(
            load[expert] * share
            for expert, share in zip(held, shares, strict=True)
            if expert != EMPTY
        )
        / WHOLE
        for held, shares in zip(placement.slots, placement.shares, strict=True)
    ]


def replicate(load: Sequence[float], num_ranks: int, slots_per_rank: int) -> list[int]:
    """Copies of each expert, at least one, at most one a rank: the largest share is the least
    possible. All slots are used, except where every expert is on every rank.

    Raises:
        ConfigError: as ``balance``.
    """
    _check(load, num_ranks, slots_per_rank)
    return _with_all_slots(load, [1] * len(load), num_ranks, slots_per_rank)


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


def _least_and_copies(
    load: Sequence[float], num_ranks: int, slots_per_rank: int, pause: Callable[[], None]
) -> tuple[float, list[int]]:
    """About the least max / mean that these slots allow, and copies of each expert for it.

    Ranks that an expert fills have to fill their other slots too, with the lightest experts at
    best; that tells how many ranks each expert needs, and the slots how many there may be.

    Raises:
        ConfigError: as ``balance``.
    """
    _check(load, num_ranks, slots_per_rank)
    mean = sum(load) / num_ranks or 1.0
    amounts = [amount / mean for amount in load]
    heaviest = sorted(range(len(load)), key=lambda expert: (-amounts[expert], expert))
    lightest = list(accumulate(sorted(amounts), initial=0.0))

    def fits(expert: int, count: int, limit: float) -> bool:
        beside = lightest[min((slots_per_rank - 1) * count, len(load) - 1)]
        return amounts[expert] + beside <= limit * count * (1 + 1e-12)

    def copies_for(limit: float) -> list[int] | None:
        copies = [1] * len(load)
        left = num_ranks * slots_per_rank - len(load)
        for expert in heaviest:
            if fits(expert, 1, limit):
                return copies  # and so do those that are lighter
            first = max(2, int(amounts[expert] / limit))
            counts = range(first, min(num_ranks, left + 1) + 1)
            count = next((count for count in counts if fits(expert, count, limit)), None)
            if count is None:
                return None
            copies[expert] = count
            left -= count - 1
        return copies

    low, high = 1.0, 1.0 + amounts[heaviest[0]] + lightest[min(slots_per_rank, len(load)) - 1]
    found = copies_for(low)
    if found is None:
        for _ in range(_HALVINGS):
            pause()
            limit = (low + high) / 2
            found = copies_for(limit)
            low, high = (limit, high) if found is None else (low, limit)
        found = copies_for(high)
        assert found is not None
    else:
        high = low
    return high, _with_all_slots(load, found, num_ranks, slots_per_rank)


def _not_worse_than_evenly(load: Sequence[float], placement: ExpertPlacement) -> ExpertPlacement:
    """Shares are rounded, and only nearly level."""
    evenly = ExpertPlacement(placement.num_experts, placement.slots)
    return min(placement, evenly, key=lambda each: max(rank_loads(load, each)))


def _least_shared(placement: ExpertPlacement, topology: Topology) -> int:
    """What ``shared_trays`` is where replicas are in as many trays as they can be."""
    return sum(max(0, len(slots) - topology.num_trays) for slots in placement.replicas())


def _domains(topology: Topology, mode: Mode) -> Topology:
    return Topology(topology.num_ranks) if mode == "global" else topology
