"""A layer of experts: dispatch tokens to the ranks that hold them, compute, combine.

With ``exact`` numerics the result is the same bit for bit on any number of ranks and with any
batch-mates. Which experts a token chose, and why, is the router's business.

Shape suffixes: T tokens of this rank   K chosen experts   R (token, k) rows   D model width
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engine.collectives import ExpertGroup
from engine.experts.grouped_gemm import ExpertWeights, swiglu_experts
from engine.experts.placement import ExpertPlacement

Numerics = Literal["exact", "fast"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingExperts:
    """What ``dispatch`` has sent off and ``combine`` brings home."""

    x_TD: Tensor
    slot_TK: Tensor
    weights_TK: Tensor


class ExpertLayer:
    """The routed experts of one MoE layer, SwiGLU inside.

    Every rank calls every layer in every step, with zero tokens if it has none. Between
    ``dispatch`` and ``combine`` the caller may compute what needs no routing (a shared expert).
    """

    def __init__(
        self,
        weights: ExpertWeights,
        placement: ExpertPlacement,
        group: ExpertGroup,
        numerics: Numerics,
    ) -> None:
        self._weights = weights
        self._numerics = numerics
        self._group = group
        self._slot_of_expert = torch.tensor(
            placement.slots_seen_from(group.rank), device=group.device
        )

    def __call__(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Weighted sum over each token's chosen experts, (T, D) in the dtype of ``x_TD``.

        An id of -1 is not routed and adds nothing.

        Raises:
            WorkerLost: another rank failed; nothing was computed for this step.
        """
        return self.combine(self.dispatch(x_TD, topk_ids_TK, topk_weights_TK))

    def dispatch(
        self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor
    ) -> PendingExperts:
        return PendingExperts(
            x_TD=x_TD, slot_TK=self._slot_of_expert[topk_ids_TK], weights_TK=topk_weights_TK
        )

    def combine(self, pending: PendingExperts) -> Tensor:
        x_TD, slot_TK = pending.x_TD, pending.slot_TK
        if not x_TD.shape[0]:
            return x_TD
        num_chosen = slot_TK.shape[1]
        rows_RD = x_TD.repeat_interleave(num_chosen, dim=0)
        y_RD = swiglu_experts(self._weights, rows_RD, slot_TK.flatten())
        y_TKD = y_RD.view(*slot_TK.shape, -1).float() * pending.weights_TK.unsqueeze(-1)
        return y_TKD.sum(dim=1).to(x_TD.dtype)
