"""Stages: ranks that follow one another through a model's layers, and how rows go from one to the
next.

A stage has some neighbouring layers and as many ranks as any other; ranks of one stage share each
of its layers (``engine.tensor_parallel``) and all have the same rows. While a stage computes one
batch, the one before it computes the next. What is in the batches is unknown here.

Shape suffixes: N rows   D hidden
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.collectives import ExpertGroup
from protocol.kv import layers_of_stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    def layers(self, num_layers: int) -> range:
        """
        Raises:
            LayoutMismatch: the model has fewer layers than there are stages.
        """
        return layers_of_stage(self.index, self.count, num_layers)


ALL_LAYERS = Stage()


class Relay:
    """Hands rows of ``hidden`` numbers on. The ranks of ``group`` are numbered stage by stage."""

    def __init__(
        self, group: ExpertGroup, stage: Stage, *, hidden: int, dtype: torch.dtype
    ) -> None:
        self._group = group
        self.stage = stage
        self._nothing_0D = torch.empty(0, hidden, dtype=dtype, device=group.device)
        width = group.num_seats // stage.count
        self._to: int | None = group.seat + width
        self._from: int | None = group.seat - width
        if stage.is_last:  # rank 0 gets what comes out, and from one rank only
            self._to = 0 if group.seat % width == 0 else None
        if stage.is_first:
            self._from = group.num_seats - width if group.seat == 0 else None

    def pass_on(self, x_ND: Tensor | None, arriving: int) -> Tensor:
        """Give the rows to the next stage, None for none, and take as many as are said to arrive
        from the one before; rank 0 takes those of the last stage. Ranks that nobody sends to get
        none.

        All ranks of all stages call it, in the same order.

        Raises:
            WorkerLost: a rank failed or did not answer in time.
        """
        sent, received = [0] * self._group.num_seats, [0] * self._group.num_seats
        if x_ND is None or self._to is None:
            x_ND = self._nothing_0D
        else:
            sent[self._to] = x_ND.shape[0]
        if self._from is not None:
            received[self._from] = arriving
        return self._group.exchange_rows(x_ND, sent, received).wait()
