"""Which expert slot of which rank holds which expert.

Every expert has at least one slot, and no two slots of a rank hold the same expert. Any number of
experts fits on any number of ranks; slots that are left over are empty. Pure arithmetic: no
torch, no weights, no load statistics.

Ranks of one tray are consecutive and may fail together.
"""

from dataclasses import dataclass
from itertools import chain, pairwise

from protocol.errors import ConfigError

EMPTY = -1


@dataclass(frozen=True, slots=True)
class Topology:
    """``num_ranks`` ranks in trays of ``ranks_per_tray``; the last tray may have fewer.

    Raises:
        ConfigError: a count is below 1.
    """

    num_ranks: int
    ranks_per_tray: int = 1

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or self.ranks_per_tray < 1:
            raise ConfigError(
                f"{self.num_ranks} ranks in trays of {self.ranks_per_tray}: both must be at least 1"
            )

    @property
    def num_trays(self) -> int:
        return -(-self.num_ranks // self.ranks_per_tray)

    def tray_of(self, rank: int) -> int:
        return rank // self.ranks_per_tray

    def ranks_of(self, tray: int) -> range:
        first = tray * self.ranks_per_tray
        return range(first, min(first + self.ranks_per_tray, self.num_ranks))


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """``slots[rank][local slot]`` is a logical expert or ``EMPTY``.

    Raises:
        ConfigError: an expert has no slot, is twice on one rank, or does not exist.
    """

    num_experts: int
    slots: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        self.validate()

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

    def validate(self) -> None:
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
    coming = (EMPTY,) * (per_rank - placement.slots_per_rank)
    slots = tuple(held + coming for held in placement.slots)
    return ExpertPlacement(placement.num_experts, slots)


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
    slots = []
    for old, new in zip(before.slots, after.slots, strict=True):
        coming = iter(sorted(set(new) - set(old) - {EMPTY}))
        staying = set(new) - {EMPTY}
        slots.append(tuple(held if held in staying else next(coming, EMPTY) for held in old))
    return ExpertPlacement(after.num_experts, tuple(slots))


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
