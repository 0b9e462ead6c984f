"""Which slots the members of a group fill when other ranks are absent.

An absent rank holds nothing. Its experts that nobody else holds go to empty slots, and where there
are none, to slots of experts that have another replica. Everything else stays where it is, so that
as little as possible has to be read before the members go on. What replicas are left of an expert
share its tokens in the proportion that they had. A pure function of the placement and the members:
all of them find the same without a word. No torch, no weights.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import chain

from engine.experts.placement import EMPTY, ExpertPlacement, shares_by
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
    weights = [
        [share if new == old else 1 for new, old, share in zip(*of_rank, strict=True)]
        for of_rank in zip(slots, placement.slots, placement.shares, strict=True)
    ]
    return ExpertPlacement(
        placement.num_experts, tuple(map(tuple, slots)), shares_by(slots, weights)
    )


def without_absent(placement: ExpertPlacement, members: Sequence[int]) -> ExpertPlacement:
    """As if the members were all ranks that there are; they hold every expert."""
    return ExpertPlacement(
        placement.num_experts,
        tuple(placement.slots[seat] for seat in members),
        tuple(placement.shares[seat] for seat in members),
    )


def with_absent(
    placement: ExpertPlacement, members: Sequence[int], num_seats: int
) -> ExpertPlacement:
    """``placement`` of the members as one of all seats, of which the others hold nothing."""
    slots = [(EMPTY,) * placement.slots_per_rank] * num_seats
    shares = [(0,) * placement.slots_per_rank] * num_seats
    for rank, seat in enumerate(members):
        slots[seat], shares[seat] = placement.slots[rank], placement.shares[rank]
    return ExpertPlacement(placement.num_experts, tuple(slots), tuple(shares))


def _slot_to_spare(held: list[int], copies: Counter[int]) -> int | None:
    """An empty slot, else that of the expert with the most replicas, if any has another one."""
    if EMPTY in held:
        return held.index(EMPTY)
    slot = max(range(len(held)), key=lambda slot: copies[held[slot]])
    return slot if copies[held[slot]] > 1 else None
