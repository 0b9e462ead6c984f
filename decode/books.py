"""What a decode rank's scheduler counts: the sums that its load, its metrics and its tests read."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeBooks:
    """Blocks by state, and requests by state."""

    free: int
    cached: int
    granted: int
    active: int
    quarantined: int
    total: int
    reservable: int  # blocks that one ``reserve`` could take now, while nobody gives way
    spare: int  # free and cached, headroom out: kept for requests that are swapped out, if any are
    granted_requests: int
    running_requests: int
    waiting_requests: int  # committed, beyond ``max_batch``
    swapped_requests: int
    quarantined_requests: int
