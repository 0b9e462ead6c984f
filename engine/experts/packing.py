"""Puts replicas on ranks, so that ranks can be made level.

Experts that have replicas are placed first. Ranks that these join can share what the others of
them hold, so they are then filled as one. Pure; how many replicas an expert should have is the
balancer's business.
"""

from bisect import insort
from collections.abc import Sequence

from engine.experts.holdings import Holdings
from engine.experts.placement import EMPTY, ExpertPlacement


def pack(holdings: Holdings, copies: Sequence[int]) -> None:
    """Place ``copies[e]`` replicas of every expert on ranks that hold nothing yet."""
    replicated = [expert for expert, number in enumerate(copies) if number > 1]
    _place(holdings, [expert for expert in replicated for _ in range(copies[expert])], copies)
    _fill(holdings, [expert for expert, number in enumerate(copies) if number == 1])
    holdings.level(range(holdings.num_ranks))


def adopt(holdings: Holdings, current: ExpertPlacement, copies: Sequence[int]) -> None:
    """Start from ``current``, with replicas taken from busy ranks and added to idle ones until
    every expert has its number of ``copies``. The ranks hold nothing yet.
    """
    for rank, held in enumerate(current.slots):
        for expert in held:
            if expert != EMPTY:
                holdings.put(expert, rank)
    missing = []
    for expert, wanted in enumerate(copies):
        holdings.share_evenly(expert)
        number = len(holdings.ranks_of[expert])
        missing += [expert] * (wanted - number)
        for _ in range(number - wanted):
            holdings.take(expert, holdings.most_dispensable(expert))
            holdings.share_evenly(expert)
    _place(holdings, missing, copies)
    holdings.level(range(holdings.num_ranks))


def _fill(holdings: Holdings, experts: Sequence[int]) -> None:
    """Heaviest first, each where the level is then the lowest."""
    loads = holdings.loads
    joined = [ranks for ranks in holdings.joined() if any(map(holdings.has_room, ranks))]
    levels = sorted(
        (sum(loads[rank] for rank in ranks) / len(ranks), which)
        for which, ranks in enumerate(joined)
    )
    for expert in sorted(experts, key=lambda expert: (-holdings.load[expert], expert)):
        holdings.pause()
        amount = holdings.load[expert]
        best, lowest = 0, float("inf")
        for place, (level, which) in enumerate(levels):
            if level >= lowest:
                break
            after = level + amount / len(joined[which])
            if after < lowest:
                best, lowest = place, after
        _, which = levels.pop(best)
        rank = min(filter(holdings.has_room, joined[which]), key=holdings.order)
        holdings.put(expert, rank, amount)
        if any(map(holdings.has_room, joined[which])):
            insort(levels, (lowest, which))


def _place(holdings: Holdings, replicas: Sequence[int], copies: Sequence[int]) -> None:
    """Heaviest first, each on the rank with the least load that may take it."""
    amounts = [load / number for load, number in zip(holdings.load, copies, strict=True)]
    for expert in sorted(replicas, key=lambda expert: (-amounts[expert], expert)):
        holdings.pause()
        fewest = holdings.fewest_in_a_tray(expert)
        fitting = [
            rank
            for rank in range(holdings.num_ranks)
            if holdings.has_room(rank) and holdings.may_take(expert, rank, fewest)
        ]
        if not fitting:
            fitting = [_make_room(holdings, expert, fewest)]
        holdings.put(expert, min(fitting, key=holdings.order), amounts[expert])
    for expert in set(replicas):
        holdings.share_evenly(expert)


def _make_room(holdings: Holdings, expert: int, fewest: int) -> int:
    """Every rank with room holds ``expert`` or has it in its tray: another rank gives one of its
    own away. Failing that the tray takes one more than its share.
    """
    held = holdings.held
    order = sorted(range(holdings.num_ranks), key=holdings.order)
    free = [rank for rank in range(holdings.num_ranks) if holdings.has_room(rank)]
    for target in order:
        if holdings.may_take(expert, target, fewest):
            for moved in sorted(held[target]):
                for rank in free:
                    if holdings.may_move(moved, target, rank):
                        holdings.put(moved, rank, holdings.take(moved, target))
                        return target
    for target in order:
        if holdings.has_room(target) and expert not in held[target]:
            return target
    # All ranks with room hold it. One without room does not, for an expert has at most one
    # copy a rank; being full, that rank holds something which one with room does not.
    target = next(rank for rank in order if expert not in held[rank])
    moved = min(set(held[target]) - set(held[free[0]]))
    holdings.put(moved, free[0], holdings.take(moved, target))
    return target
