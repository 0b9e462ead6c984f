"""How a model's experts are spread over the ranks when they start: the placement of every layer.

Every rank computes all placements from the same options, so ranks agree without a word. Pure.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from engine.experts.balancer import Mode, balance
from engine.experts.placement import (
    ExpertPlacement,
    Topology,
    place_evenly,
    slots_per_rank,
    with_slots,
)
from engine.experts.recorded_load import RecordedLoad
from protocol.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSpread:
    """``redundant`` slots beyond one for each expert; ``load`` says whom they are given to.

    ``least_ranks`` of the ranks have slots for every expert; None: as it comes.
    ``movable``: experts may change their slots while the model is in use, and their source is kept
    open. ``counted``: the tokens of each expert are counted.
    """

    redundant: int = 0
    least_ranks: int | None = None
    ranks_per_tray: int = 1
    load: RecordedLoad | None = None
    movable: bool = False
    counted: bool = False

    def topology(self, num_ranks: int) -> Topology:
        return Topology(num_ranks, self.ranks_per_tray)

    @property
    def mode(self) -> Mode:
        return "global" if self.ranks_per_tray == 1 else "hierarchical"

    def placements(
        self, num_experts: int, sparse_layers: Sequence[bool], num_ranks: int
    ) -> tuple[ExpertPlacement, ...]:
        """By layer, dense layers included: their placement is never asked for.

        Raises:
            ConfigError: a count is out of range, or the load is of another model.
        """
        per_rank = max(
            slots_per_rank(num_experts, num_ranks, self.redundant),
            slots_per_rank(num_experts, self.least_ranks or num_ranks),
        )
        even = with_slots(place_evenly(num_experts, num_ranks, self.redundant), per_rank)
        if self.load is None:
            return (even,) * len(sparse_layers)
        self._check_load(num_experts, sparse_layers)
        topology = self.topology(num_ranks)
        return tuple(
            balance(self.load.layers[layer], topology, per_rank, mode=self.mode) if sparse else even
            for layer, sparse in enumerate(sparse_layers)
        )

    def _check_load(self, num_experts: int, sparse_layers: Sequence[bool]) -> None:
        assert self.load is not None
        wanted = {layer for layer, sparse in enumerate(sparse_layers) if sparse}
        if self.load.num_experts != num_experts or set(self.load.layers) != wanted:
            raise ConfigError(
                f"the recorded expert load has {self.load.num_experts} experts in layers "
                f"{_listed(self.load.layers)}, the model has {num_experts} in layers "
                f"{_listed(wanted)}; record it with this model"
            )


EVENLY = ExpertSpread()


def digest(*parts: object) -> int:
    """63 bits that are equal where all ``parts``, of plain types and dataclasses, are equal."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def _listed(layers: object) -> str:
    assert isinstance(layers, set | dict)
    ascending = sorted(layers)
    if ascending and ascending == list(range(ascending[0], ascending[-1] + 1)):
        return f"{ascending[0]} to {ascending[-1]}"
    return ", ".join(map(str, ascending)) or "none"
