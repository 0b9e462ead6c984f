"""Which expert slot of which rank holds which expert.

Every expert has at least one slot, and no two slots of a rank hold the same expert. Any number of
experts fits on any number of ranks; slots that are left over are empty. Pure arithmetic: no
torch, no weights, no load statistics.
"""

from dataclasses import dataclass
from itertools import chain

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
    """Contiguous runs of experts, ranks' counts differing by at most one; then replicas.

    ``redundant`` asks for at least that many slots beyond ``num_experts``; rounding up to whole
    ranks may give more. Slots that are left go to second copies of the first experts, and so on,
    as long as an expert has a rank that does not hold it yet.

    Raises:
        ConfigError: a count is out of range.
    """
    if num_experts < 1 or num_ranks < 1 or redundant < 0:
        raise ConfigError(
            f"cannot place {num_experts} experts and {redundant} replicas on {num_ranks} ranks: "
            "experts and ranks must be at least 1, redundant at least 0"
        )
    per_rank = -(-(num_experts + redundant) // num_ranks)
    fewest, larger = divmod(num_experts, num_ranks)
    held: list[list[int]] = []
    first = 0
    for rank in range(num_ranks):
        count = fewest + (rank < larger)
        held.append(list(range(first, first + count)))
        first += count
    _add_replicas(held, num_experts, per_rank, redundant)
    return ExpertPlacement(
        num_experts, tuple(tuple(run + [EMPTY] * (per_rank - len(run))) for run in held)
    )


def _add_replicas(held: list[list[int]], num_experts: int, per_rank: int, redundant: int) -> None:
    """Put up to ``redundant`` copies where room is; the emptiest rank without the expert first."""
    for copy in range(redundant):
        expert = copy % num_experts
        open_ranks = [run for run in held if len(run) < per_rank and expert not in run]
        if open_ranks:
            min(open_ranks, key=len).append(expert)
