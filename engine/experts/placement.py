"""Which expert slot of which rank holds which expert, and which share of its tokens goes there.

Every expert has at least one slot, no two slots of a rank hold the same expert, and the shares of
an expert's slots add up to ``WHOLE``. Any number of experts fits on any number of ranks; slots that
are left over are empty. Pure arithmetic: no torch, no weights, no load statistics.

Ranks of one tray are consecutive and may fail together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from protocol.errors import ConfigError

EMPTY = -1
WHOLE_BITS = 16
WHOLE = 1 << WHOLE_BITS  # an expert's share over all its slots


@dataclass(frozen=True, slots=True)
class Topology:
    """``num_ranks`` ranks in trays of ``ranks_per_tray``; the last tray may have fewer.

    ``seats`` says which places ranks have where others are absent; none: their own numbers'.

    Raises:
        ConfigError: a count is below 1.
    """

    num_ranks: int
    ranks_per_tray: int = 1
    seats: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or self.ranks_per_tray < 1:
            raise ConfigError(
                f"{self.num_ranks} ranks in trays of {self.ranks_per_tray}: both must be at least 1"
            )

    def among(self, seats: Sequence[int]) -> "Topology":
        """Of a group in which only these seats, ascending, are taken."""
        return Topology(len(seats), self.ranks_per_tray, tuple(seats))

    @property
    def num_trays(self) -> int:
        """Those that have ranks."""
        return len({self.tray_of(rank) for rank in range(self.num_ranks)})

    def tray_of(self, rank: int) -> int:
        return (self.seats[rank] if self.seats else rank) // self.ranks_per_tray


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """``slots[rank][local slot]`` is a logical expert or ``EMPTY``, and ``shares`` says of each
    slot how much of ``WHOLE`` of its expert's tokens it gets; without them all get equally much.

    Raises:
        ConfigError: an expert has no slot, is twice on one rank, or does not exist, or its shares
            are not those of one whole.
    """

    num_experts: int
    slots: tuple[tuple[int, ...], ...]
    shares: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        self._validate_slots()
        if self.shares:
            self._validate_shares()
        else:
            evenly = shares_by(self.slots, tuple((1,) * len(held) for held in self.slots))
            object.__setattr__(self, "shares", evenly)

    @property
    def num_ranks(self) -> int:
        return len(self.slots)

    @property
    def slots_per_rank(self) -> int:
        return len(self.slots[0])

    def slots_of(self, rank: int) -> tuple[int, ...]:
        """The logical expert in each local slot of ``rank``, ``EMPTY`` where there is none."""
        return self.slots[rank]

    def replicas_of(self, expert: int) -> tuple[int, ...]:
        """Physical slots, ``rank * slots_per_rank + local slot``, that hold it, ascending."""
        physical = chain.from_iterable(self.slots)
        return tuple(slot for slot, held in enumerate(physical) if held == expert)

    def shares_of(self, rank: int) -> tuple[int, ...]:
        """Beside ``slots_of``: how much of ``WHOLE``; 0 where there is no expert."""
        return self.shares[rank]

    @property
    def has_replicas(self) -> bool:
        return any(len(slots) > 1 for slots in self.replicas())

    def replicas(self) -> tuple[tuple[int, ...], ...]:
        """``replicas_of`` every expert."""
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(chain.from_iterable(self.slots)):
            if expert != EMPTY:
                found[expert].append(slot)
        return tuple(map(tuple, found))

    def _validate_slots(self) -> None:
        if not self.slots:
            raise ConfigError("a placement needs at least one rank")
        if len({len(held) for held in self.slots}) != 1:
            raise ConfigError("every rank must have the same number of expert slots")
        for rank, held in enumerate(self.slots):
            experts = [expert for expert in held if expert != EMPTY]
            if len(set(experts)) != len(experts):
                raise ConfigError(f"rank {rank} holds an expert twice: {held}", rank=rank)
            if any(not 0 <= expert < self.num_experts for expert in experts):
                raise ConfigError(
                    f"rank {rank} holds experts {held}, but there are only {self.num_experts}",
                    rank=rank,
                )
        missing = set(range(self.num_experts)) - set(chain.from_iterable(self.slots))
        if missing:
            raise ConfigError(f"experts without a slot: {sorted(missing)[:8]}")

    def _validate_shares(self) -> None:
        if list(map(len, self.shares)) != list(map(len, self.slots)):
            raise ConfigError("a placement needs one share for each expert slot")
        totals = [0] * self.num_experts
        for rank, (held, shares) in enumerate(zip(self.slots, self.shares, strict=True)):
            for expert, share in zip(held, shares, strict=True):
                if share < 0 or (expert == EMPTY and share):
                    raise ConfigError(
                        f"rank {rank} holds experts {held} with shares {shares}: a share is at "
                        "least 0, and 0 where there is no expert",
                        rank=rank,
                    )
                if expert != EMPTY:
                    totals[expert] += share
        wrong = [expert for expert, total in enumerate(totals) if total != WHOLE]
        if wrong:
            raise ConfigError(f"shares of experts {wrong[:8]} do not add up to {WHOLE}")


def shares_by(
    slots: Sequence[Sequence[int]], weights: Sequence[Sequence[float]]
) -> tuple[tuple[int, ...], ...]:
    """Shares of ``slots`` in proportion to ``weights``, at least 0 each; equal ones for an expert
    whose weights are all 0.
    """
    totals: dict[int, float] = {}
    counts: dict[int, int] = {}
    for expert, weight in zip(chain(*slots), chain(*weights), strict=True):
        totals[expert] = totals.get(expert, 0) + weight
        counts[expert] = counts.get(expert, 0) + 1
    done: dict[int, float] = {}
    given: dict[int, int] = {}

    def share(expert: int, weight: float) -> int:
        if expert == EMPTY:
            return 0
        total = totals[expert]
        done[expert] = done.get(expert, 0) + (weight if total else 1)
        until = round(WHOLE * done[expert] / (total or counts[expert]))
        before, given[expert] = given.get(expert, 0), until
        return until - before

    return tuple(
        tuple(share(expert, weight) for expert, weight in zip(held, of_rank, strict=True))
        for held, of_rank in zip(slots, weights, strict=True)
    )


def place_evenly(num_experts: int, num_ranks: int, redundant: int = 0) -> ExpertPlacement:
    """Contiguous runs of experts; ranks' counts differ by at most one, experts' copies too.

    There are ``slots_per_rank(...)`` slots on each rank and ``redundant`` further copies, or fewer
    where an expert would have to be twice on a rank. Whatever the trays, provided they are of
    equal size: no two copies of an expert share one, unless there are more copies than trays.

    Raises:
        ConfigError: a count is out of range.
    """
    per_rank = slots_per_rank(num_experts, num_ranks, redundant)
    # Experts in a circle, cut into runs: a run of at most a whole circle has none twice.
    copies = min(num_experts + redundant, num_experts * num_ranks)
    bounds = [rank * copies // num_ranks for rank in range(num_ranks + 1)]
    runs = [
        tuple(copy % num_experts for copy in range(first, end)) for first, end in pairwise(bounds)
    ]
    return ExpertPlacement(
        num_experts, tuple(run + (EMPTY,) * (per_rank - len(run)) for run in runs)
    )


def with_slots(placement: ExpertPlacement, per_rank: int) -> ExpertPlacement:
    """``placement`` with at least ``per_rank`` slots on each rank; those that come are empty."""
    coming = max(0, per_rank - placement.slots_per_rank)
    slots = tuple(held + (EMPTY,) * coming for held in placement.slots)
    shares = tuple(of_rank + (0,) * coming for of_rank in placement.shares)
    return ExpertPlacement(placement.num_experts, slots, shares)


def slots_per_rank(num_experts: int, num_ranks: int, redundant: int = 0) -> int:
    """``ceil((num_experts + redundant) / num_ranks)``, equal on every rank.

    Raises:
        ConfigError: a count is out of range.
    """
    if num_experts < 1 or num_ranks < 1 or redundant < 0:
        raise ConfigError(
            f"cannot place {num_experts} experts and {redundant} replicas on {num_ranks} ranks: "
            "experts and ranks must be at least 1, redundant at least 0"
        )
    return -(-(num_experts + redundant) // num_ranks)


def moves(before: ExpertPlacement, after: ExpertPlacement) -> int:
    """Experts that come to ranks which did not hold them."""
    return sum(
        len(set(new) - set(old) - {EMPTY})
        for old, new in zip(before.slots, after.slots, strict=True)
    )


def keeping_slots(before: ExpertPlacement, after: ExpertPlacement) -> ExpertPlacement:
    """``after``, with every expert that stays on its rank in the slot that it has there."""
    slots, shares = [], []
    for old, new, of_rank in zip(before.slots, after.slots, after.shares, strict=True):
        share_of = dict(zip(new, of_rank, strict=True)) | {EMPTY: 0}
        coming = iter(sorted(set(new) - set(old) - {EMPTY}))
        staying = set(new) - {EMPTY}
        kept = tuple(held if held in staying else next(coming, EMPTY) for held in old)
        slots.append(kept)
        shares.append(tuple(share_of[expert] for expert in kept))
    return ExpertPlacement(after.num_experts, tuple(slots), tuple(shares))


def shared_trays(placement: ExpertPlacement, topology: Topology) -> int:
    """Replicas that are in a tray with another one of their expert. Where they are spread as far
    as can be, that is only where an expert has more replicas than there are trays.
    """
    return sum(
        len(trays) - len(set(trays))
        for trays in (
            tuple(topology.tray_of(slot // placement.slots_per_rank) for slot in slots)
            for slots in placement.replicas()
        )
    )
