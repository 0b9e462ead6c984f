"""Which expert slot of which rank holds which expert.

Every expert has at least one slot, and no two slots of a rank hold the same expert. Any number of
experts fits on any number of ranks; slots that are left over are empty. Pure arithmetic: no
torch, no weights, no load statistics.
"""

from dataclasses import dataclass
from itertools import chain, pairwise

from protocol.errors import ConfigError

EMPTY = -1


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

    def slots_seen_from(self, rank: int) -> tuple[int, ...]:
        """For each logical expert the physical slot that tokens of ``rank`` are sent to.

        Its own replica where it has one, so that nothing travels; otherwise the replicas share
        the source ranks out evenly. Replicas hold equal bytes, so this never changes a result.
        """
        replicas: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(chain.from_iterable(self.slots)):
            if expert != EMPTY:
                replicas[expert].append(slot)
        here = range(rank * self.slots_per_rank, (rank + 1) * self.slots_per_rank)
        return tuple(
            next((slot for slot in held if slot in here), held[rank % len(held)])
            for held in replicas
        )

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

    ``slots_per_rank`` is ``ceil((num_experts + redundant) / num_ranks)``. There are ``redundant``
    further copies, or fewer where an expert would have to be twice on a rank.

    Raises:
        ConfigError: a count is out of range.
    """
    if num_experts < 1 or num_ranks < 1 or redundant < 0:
        raise ConfigError(
            f"cannot place {num_experts} experts and {redundant} replicas on {num_ranks} ranks: "
            "experts and ranks must be at least 1, redundant at least 0"
        )
    per_rank = -(-(num_experts + redundant) // num_ranks)
    # Experts in a circle, cut into runs: a run of at most a whole circle has none twice.
    copies = min(num_experts + redundant, num_experts * num_ranks)
    bounds = [rank * copies // num_ranks for rank in range(num_ranks + 1)]
    runs = [
        tuple(copy % num_experts for copy in range(first, end)) for first, end in pairwise(bounds)
    ]
    return ExpertPlacement(
        num_experts, tuple(run + (EMPTY,) * (per_rank - len(run)) for run in runs)
    )
