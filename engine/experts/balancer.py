"""Which experts get further replicas, and which ranks hold what, so that ranks do equal work.

A replica carries its expert's load divided by the number of replicas. Experts are replicated where
that share is largest, packed on ranks heaviest first, and then exchanged between the busiest rank
and the others while that helps. Pure: ranks that start with the same recorded load place alike.
How load is counted and how experts move is unknown here.

Replication and packing are those of DeepSeek's EPLB, with ranks that never hold an expert twice,
any number of ranks, and few moves.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from engine.experts.packing import Packing
from engine.experts.placement import (
    ExpertPlacement,
    Topology,
    keeping_slots,
    moves,
    shared_trays,
)
from protocol.errors import ConfigError

Mode = Literal["global", "hierarchical"]

WORTH_MOVING = 0.01  # of the mean: what gains less is not worth further moves or search
_DONORS = 4
_LEAST_GAIN = 1e-6


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
    domains = _domains(topology, mode)
    copies = replicate(load, topology.num_ranks, slots_per_rank)
    best = _packed(load, copies, domains, slots_per_rank, pause)
    while best.max_over_mean > 1 + WORTH_MOVING:
        for copies in _trades(load, best):
            packing = _packed(load, copies, domains, slots_per_rank, pause)
            if packing.max_over_mean < best.max_over_mean - _LEAST_GAIN:
                best = packing
                break
        else:
            break
    return best.placement()


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
    best = balance(load, topology, current.slots_per_rank, mode=mode, pause=pause)
    goal = balance_of(load, best).max_over_mean + WORTH_MOVING
    shared = shared_trays(best, domains)

    def suffices(placement: ExpertPlacement) -> bool:
        even = balance_of(load, placement).max_over_mean <= goal
        return even and shared_trays(placement, domains) <= shared

    if suffices(current):
        return current
    copies = [len(replicas) for replicas in best.replicas()]
    packing = Packing(load, copies, domains, current.slots_per_rank, pause)
    packing.adopt(current)
    packing.exchange(until=goal)
    near = packing.placement()
    found = min(
        [placement for placement in (near, best) if suffices(placement)],
        key=lambda placement: moves(current, placement),
    )
    return keeping_slots(current, found)


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
    """What each rank carries when replicas share their expert's load evenly."""
    loads = [0.0] * placement.num_ranks
    for amount, slots in zip(load, placement.replicas(), strict=True):
        for slot in slots:
            loads[slot // placement.slots_per_rank] += amount / len(slots)
    return loads


def replicate(load: Sequence[float], num_ranks: int, slots_per_rank: int) -> list[int]:
    """Copies of each expert, at least one, at most one a rank: the largest share is the least
    possible. All slots are used, except where every expert is on every rank.

    Raises:
        ConfigError: as ``balance``.
    """
    if not load or any(not math.isfinite(amount) or amount < 0 for amount in load):
        raise ConfigError("a load needs one finite number, at least 0, for every expert")
    left = num_ranks * slots_per_rank - len(load)
    if left < 0:
        raise ConfigError(
            f"{len(load)} experts do not fit in {slots_per_rank} slots on each of {num_ranks} "
            f"ranks: at least {-(-len(load) // num_ranks)} slots are needed"
        )
    copies = [1] * len(load)
    shares = [(-amount, 1, expert) for expert, amount in enumerate(load)]
    heapq.heapify(shares)
    while left and shares:
        _, count, expert = heapq.heappop(shares)
        if count == num_ranks:
            continue
        copies[expert] = count + 1
        left -= 1
        heapq.heappush(shares, (-load[expert] / (count + 1), count + 1, expert))
    return copies


def _domains(topology: Topology, mode: Mode) -> Topology:
    return Topology(topology.num_ranks) if mode == "global" else topology


def _packed(
    load: Sequence[float],
    copies: Sequence[int],
    domains: Topology,
    slots_per_rank: int,
    pause: Callable[[], None],
) -> Packing:
    packing = Packing(load, copies, domains, slots_per_rank, pause)
    packing.place_all()
    packing.exchange(until=0.0)
    return packing


def _trades(load: Sequence[float], packing: Packing) -> Iterator[list[int]]:
    """Copies with one more of the expert that makes the busiest rank busy, at the cost of another.

    A rank that holds a large share has to fill its other slots too: the smallest possible largest
    share, which ``replicate`` gives, need not be the best.
    """
    copies, wanted = packing.copies, packing.heaviest_of_the_busiest()
    donors = [expert for expert, count in enumerate(copies) if count > 1 and expert != wanted]
    donors.sort(key=lambda expert: (load[expert] / (copies[expert] - 1), expert))
    if copies[wanted] == packing.num_ranks:
        return
    for donor in donors[:_DONORS]:
        traded = list(copies)
        traded[wanted] += 1
        traded[donor] -= 1
        yield traded
