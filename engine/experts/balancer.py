"""Which experts get further replicas, which ranks hold what, and which share of an expert's tokens
each replica gets, so that ranks do equal work.

Replicas need not get equal shares: ranks that replicas join can carry together whatever they hold.
So a heavy expert gets as many ranks as its load and the lightest experts beside it fill; the others
are packed into what is left, heaviest first; experts are exchanged between the busiest rank and the
others while that helps; and shares are poured until the ranks are level. Pure: ranks that start
with the same recorded load place alike. How load is counted and how experts move is unknown here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from engine.experts.replication import may_reach, replicate, replicate_to_fill
from protocol.errors import ConfigError

Mode = Literal["global", "hierarchical"]

WORTH_MOVING = 0.01  # of the mean: what gains less is not worth further moves
_NEAR_ENOUGH = 0.001  # of the mean: what gains less is not worth further search


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
    copies, least = replicate_to_fill(load, topology.num_ranks, slots_per_rank, pause)
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
        copies = [len(slots) for slots in placement.replicas()]
        if may_reach(load, copies, current.num_ranks, current.slots_per_rank, goal):
            found.append(near(copies))
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


def _not_worse_than_evenly(load: Sequence[float], placement: ExpertPlacement) -> ExpertPlacement:
    """Shares are rounded, and only nearly level."""
    evenly = ExpertPlacement(placement.num_experts, placement.slots)
    return min(placement, evenly, key=lambda each: max(rank_loads(load, each)))


def _least_shared(placement: ExpertPlacement, topology: Topology) -> int:
    """What ``shared_trays`` is where replicas are in as many trays as they can be."""
    return sum(max(0, len(slots) - topology.num_trays) for slots in placement.replicas())


def _domains(topology: Topology, mode: Mode) -> Topology:
    return Topology(topology.num_ranks) if mode == "global" else topology
