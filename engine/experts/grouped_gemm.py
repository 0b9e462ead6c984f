"""The experts of one rank applied to rows that are sorted by expert slot.

``exact`` makes a row's result independent of which and how many rows are with it.

Shape suffixes: S local expert slots   R rows   D model width   I expert width   M rows of a tile
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """Local slots of one layer. Gate rows come first, up rows second; an empty slot is zeros."""

    gate_up: Tensor  # (S, 2I, D)
    down: Tensor  # (S, D, I)

    @property
    def num_slots(self) -> int:
        return self.gate_up.shape[0]


def swiglu_experts(weights: ExpertWeights, x_RD: Tensor, slot_R: Tensor) -> Tensor:
    """``down(silu(gate(x)) * up(x))`` of each row by the expert in its local slot, (R, D)."""
    counts_S = torch.bincount(slot_R, minlength=weights.num_slots)
    most = int(counts_S.max())  # host sync
    order_R = torch.argsort(slot_R, stable=True)
    sorted_slot_R = slot_R[order_R]
    first_S = counts_S.cumsum(0) - counts_S
    place_R = sorted_slot_R * most + torch.arange(len(slot_R), device=x_RD.device)
    place_R = place_R - first_S[sorted_slot_R]
    padded_SMD = x_RD.new_zeros(weights.num_slots * most, x_RD.shape[1])
    padded_SMD[place_R] = x_RD[order_R]
    hidden = torch.bmm(
        padded_SMD.view(weights.num_slots, most, -1), weights.gate_up.transpose(1, 2)
    )
    gate, up = hidden.chunk(2, dim=-1)
    y_SMD = torch.bmm(torch.nn.functional.silu(gate) * up, weights.down.transpose(1, 2))
    y_RD = torch.empty_like(x_RD)
    y_RD[order_R] = y_SMD.flatten(0, 1)[place_R]
    return y_RD
