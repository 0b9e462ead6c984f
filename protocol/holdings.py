"""What callers hold of a decode rank's blocks, and how much of it another caller may ask for.

One rule for two readers: the rank that decides who gives way, and gateways that guess whether to
ask it. Callers of a higher priority come first. Among equals each may hold an equal part of what
those leave, and whoever holds more gives way to whoever does not. Pure; requests, and which of them
gives way, are not known here. Source: max-min fairness, Bertsekas and Gallager, "Data Networks",
section 6.5.2.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec


class Holds(Protocol):
    @property
    def priority(self) -> int: ...

    @property
    def blocks(self) -> int: ...


class Holding(msgspec.Struct, frozen=True, array_like=True):
    """One caller's share of a rank, at one priority. ``caller`` is the name of an API key."""

    caller: str
    priority: int
    blocks: int  # granted, active and quarantined
    yielding: int  # of them those of sequences that may be swapped out for others
    swapped_requests: int


def standing(holder: Holds) -> tuple[int, int]:
    """Whose turn is next for free blocks: the smallest first, whoever has least of equals."""
    return -holder.priority, holder.blocks


def fair_part(total_blocks: int, priority: int, others: Iterable[Holds]) -> int:
    """Blocks that a caller may hold before it gives way to ``others`` of its priority."""
    equals = 1
    for other in others:
        if other.priority > priority:
            total_blocks -= other.blocks
        elif other.priority == priority:
            equals += 1
    return max(0, total_blocks) // equals


def room_from_others(
    holdings: Sequence[Holding], *, caller: str, priority: int, total_blocks: int
) -> int:
    """Blocks that ``caller`` could be granted while others give way, at most."""
    own, others = 0, []
    for holding in holdings:
        if (holding.caller, holding.priority) != (caller, priority):
            others.append(holding)
        elif holding.swapped_requests:
            return 0  # what it gets is for those
        else:
            own = holding.blocks
    part = fair_part(total_blocks, priority, others)
    lower = sum(other.yielding for other in others if other.priority < priority)
    over = sum(o.yielding for o in others if o.priority == priority and o.blocks > part)
    return max(lower, min(lower + over, part - own))


def room_kept(holdings: Sequence[Holding], *, caller: str, priority: int, spare_blocks: int) -> int:
    """How many of the ``spare_blocks``, which are kept for requests that are swapped out, a caller
    may have because its turn is before theirs.
    """
    own = sum(h.blocks for h in holdings if (h.caller, h.priority) == (caller, priority))
    waiting = [standing(holding) for holding in holdings if holding.swapped_requests]
    return spare_blocks if not waiting or (-priority, own) < min(waiting) else 0
