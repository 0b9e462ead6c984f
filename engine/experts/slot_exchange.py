"""How experts come to other slots of a rank while the model is in use.

New experts are read beside the running model into memory of their own, and then copied into their
slots between two steps. No address ever changes, so captured graphs stay valid; and until the
copy nothing of the model has changed, so whatever fails before it leaves the old placement whole.
When ranks commit, and what they agreed on, is unknown here.

Shape suffixes: C experts that come   D model width   I expert width   F 2 I
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.experts.grouped_gemm import ExpertWeights
from engine.experts.layer import ExpertLayer
from engine.experts.placement import EMPTY, ExpertPlacement

ReadExpert = Callable[[int], tuple[Tensor, Tensor]]  # gate and up (F, D), down (D, I)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedSlots:
    """What this rank needs for ``placement``, on its device."""

    placement: ExpertPlacement
    slots: tuple[int, ...]  # local slots that get another expert
    gate_up_CFD: Tensor
    down_CDI: Tensor


class SlotExchange:
    """One layer's slots on this rank."""

    def __init__(
        self, layer: ExpertLayer, placement: ExpertPlacement, *, seat: int, read: ReadExpert
    ) -> None:
        """``read`` gives any expert of the layer, on any device; it may take its time."""
        self._layer = layer
        self._seat = seat
        self.read = read
        self.placement = placement

    @property
    def weights(self) -> ExpertWeights:
        """Of this rank's slots, as the model uses them."""
        return self._layer.weights

    @torch.no_grad()
    def stage(self, placement: ExpertPlacement) -> StagedSlots:
        """Read what ``placement`` brings to this rank. From any thread, while the model runs.

        Raises:
            ConfigError: an expert cannot be read any more; nothing has changed.
        """
        held, wanted = self.placement.slots_of(self._seat), placement.slots_of(self._seat)
        slots = tuple(
            slot
            for slot, (old, new) in enumerate(zip(held, wanted, strict=True))
            if new not in (old, EMPTY)
        )
        weights = self.weights
        staged = StagedSlots(
            placement=placement,
            slots=slots,
            gate_up_CFD=weights.gate_up.new_empty(len(slots), *weights.gate_up.shape[1:]),
            down_CDI=weights.down.new_empty(len(slots), *weights.down.shape[1:]),
        )
        for row, slot in enumerate(slots):
            gate_up_FD, down_DI = self.read(wanted[slot])
            staged.gate_up_CFD[row].copy_(gate_up_FD)
            staged.down_CDI[row].copy_(down_DI)
        return staged

    @torch.no_grad()
    def commit(self, staged: StagedSlots) -> None:
        """Put the experts in their slots. Between two steps, on every rank before the next."""
        weights = self.weights
        for row, slot in enumerate(staged.slots):
            weights.gate_up[slot].copy_(staged.gate_up_CFD[row])
            weights.down[slot].copy_(staged.down_CDI[row])
        self._layer.place(staged.placement)
        self.placement = staged.placement
