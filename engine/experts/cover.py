"""Which slots the members of a group fill when other ranks are absent.

An absent rank holds nothing. Its experts that nobody else holds go to empty slots, and where there
are none, to slots of experts that have another replica. Everything else stays where it is, so that
as little as possible has to be read before the members go on. A pure function of the placement and
the members: all of them find the same without a word. No torch, no weights.
"""

from collections import Counter
from collections.abc import Collection
from itertools import chain

from engine.experts.placement import EMPTY, ExpertPlacement
from protocol.errors import ConfigError


def least_ranks(placement: ExpertPlacement) -> int:
    """Fewer ranks than these have not enough slots for every expert."""
    return -(-placement.num_experts // placement.slots_per_rank)


def cover(placement: ExpertPlacement, members: Collection[int]) -> ExpertPlacement:
    """``placement`` with every expert on a member, and none on another rank.

    Raises:
        ConfigError: the members have fewer slots than there are experts.
    """
    least = least_ranks(placement)
    if len(members) < least:
        raise ConfigError(
            f"{len(members)} ranks of {placement.slots_per_rank} expert slots cannot hold "
            f"{placement.num_experts} experts: at least {least} ranks are needed"
        )
    slots = [
        list(held) if rank in members else [EMPTY] * len(held)
        for rank, held in enumerate(placement.slots)
    ]
    copies = Counter(chain.from_iterable(slots))
    came = Counter[int]()  # how many experts each rank has to read
    for expert in range(placement.num_experts):
        if copies[expert]:
            continue
        rank, slot = min(
            (
                (rank, slot)
                for rank in sorted(members)
                if (slot := _slot_to_spare(slots[rank], copies)) is not None
            ),
            key=lambda found: (
                slots[found[0]][found[1]] != EMPTY,
                came[found[0]],
                sum(held != EMPTY for held in slots[found[0]]),
            ),
        )
        copies[slots[rank][slot]] -= 1
        copies[expert] += 1
        slots[rank][slot] = expert
        came[rank] += 1
    return ExpertPlacement(placement.num_experts, tuple(map(tuple, slots)))


def _slot_to_spare(held: list[int], copies: Counter[int]) -> int | None:
    """An empty slot, else that of the expert with the most replicas, if any has another one."""
    if EMPTY in held:
        return held.index(EMPTY)
    slot = max(range(len(held)), key=lambda slot: copies[held[slot]])
    return slot if copies[held[slot]] > 1 else None
