"""Where a process stands in its prefill worker: among all ranks, among those of its stage."""

from dataclasses import dataclass

import torch

from engine.collectives import ExpertGroup
from engine.pipeline import Relay, Stage
from engine.rendezvous import Circle
from prefill.settings import PrefillGroupSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """``ranks`` are numbered stage by stage; ``sharing`` are those that share each layer, and with
    one stage the same object.
    """

    ranks: ExpertGroup
    sharing: ExpertGroup
    stage: Stage

    @classmethod
    def of(cls, settings: PrefillGroupSettings, device: torch.device) -> "Place":
        seat, num_ranks = settings.rank or 0, settings.ranks
        ranks = ExpertGroup(seat=seat, num_seats=num_ranks, device=device)
        if settings.stages == 1:
            return cls(ranks=ranks, sharing=ranks, stage=Stage())
        stage, seat = divmod(seat, num_ranks // settings.stages)
        sharing = ExpertGroup(seat=seat, num_seats=num_ranks // settings.stages, device=device)
        return cls(ranks=ranks, sharing=sharing, stage=Stage(index=stage, count=settings.stages))

    @property
    def circle(self) -> Circle | None:
        """Whom this rank exchanges rows with, beside all ranks."""
        width = self.sharing.num_seats
        if self.stage.count == 1 or width == 1:
            return None
        first = self.stage.index * width
        return Circle(group=self.sharing, seats=range(first, first + width))

    def relay(self, *, hidden: int, dtype: torch.dtype) -> Relay | None:
        """Of rows of so many numbers; None: this rank has all layers."""
        if self.stage.count == 1:
            return None
        return Relay(self.ranks, self.stage, hidden=hidden, dtype=dtype)
