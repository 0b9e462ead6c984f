"""One token per row from its logits and one uniform number, by inverse distribution function.

A row's token depends on that row's logits, parameters and number alone: every sum runs over one
row in a fixed order, whatever the other rows are. Requests and seeds are not known here.

Filters, in this order, each on what the former left: temperature; min-p (tokens at least ``min_p``
times as likely as the best); top-k (the k best, ties to the lower id); top-p (the fewest best
tokens whose share of what is left reaches ``top_p``, at least one).

Shape suffixes: R rows   V vocabulary   B blocks   W width of a block   K candidates   S some rows
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.sampling.ordering import WIDE, in_blocks, largest

NUCLEUS_GUESS = 128  # candidates looked at first for top-p; a nucleus is rarely larger
NUCLEUS_GROWTH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """The rows that have top-k or top-p, and what they have."""

    rows_S: Tensor  # (S,) int64
    top_k_S1: Tensor  # int64, V where off
    top_p_S1: Tensor  # float64, infinite where off
    max_top_k: int  # among rows that have top-k, 0 when none has
    only_top_p: bool  # some row has top-p but not top-k

    def of(self, some: Tensor) -> "Truncation":
        """The same for some of the rows, chosen by index."""
        return replace(
            self,
            rows_S=self.rows_S[some],
            top_k_S1=self.top_k_S1[some],
            top_p_S1=self.top_p_S1[some],
        )


def weights(
    logits_RV: Tensor, best_R: Tensor, temperature_R1: Tensor, min_p_R1: Tensor | None
) -> Tensor:
    """Probabilities relative to the most likely token's, (R, V) float32; min-p applied."""
    weights_RV = (logits_RV - best_R[:, None]).div_(temperature_R1).exp_()
    if min_p_R1 is not None:
        weights_RV.masked_fill_(weights_RV < min_p_R1, 0.0)
    return weights_RV


def draw(weights_RV: Tensor, uniform_R: Tensor, best_R: Tensor) -> Tensor:
    """Token ids (R,). ``best_R`` are the ids of the most likely tokens.

    Two levels, a block and then a token within, because summing blocks costs a twentieth of a
    running sum over the vocabulary.
    """
    weights_RBW = in_blocks(weights_RV, WIDE, 0.0)
    mass_RB = weights_RBW.sum(-1).double()
    block_R, share_R = _invert(mass_RB, uniform_R)
    rows_R = torch.arange(weights_RV.shape[0], device=weights_RV.device)
    chosen_RW = weights_RBW[rows_R, block_R].double()
    within_R, _ = _invert(chosen_RW, share_R)
    possible_R = chosen_RW[rows_R, within_R] > 0  # false only where rounding met a long run of 0
    return torch.where(possible_R, block_R * WIDE + within_R, best_R)


def draw_truncated(
    weights_SV: Tensor, uniform_S: Tensor, best_S: Tensor, truncation: Truncation
) -> Tensor:
    """As ``draw``, from the tokens that top-k and top-p leave; rows are those of ``truncation``."""
    count = max(truncation.max_top_k, NUCLEUS_GUESS if truncation.only_top_p else 1)
    mass_S1 = in_blocks(weights_SV, WIDE, 0.0).sum(-1).double().sum(-1, keepdim=True)
    ids_S, enough_S = _draw_from_best(
        weights_SV, mass_S1, uniform_S, best_S, truncation, count=count
    )
    while truncation.only_top_p:
        short = (~enough_S).nonzero()[:, 0]  # host sync
        if not len(short):
            break
        count = min(count * NUCLEUS_GROWTH, weights_SV.shape[1])
        ids_S[short], enough_S[short] = _draw_from_best(
            weights_SV[short],
            mass_S1[short],
            uniform_S[short],
            best_S[short],
            truncation.of(short),
            count=count,
        )
    return ids_S


def _draw_from_best(
    weights_SV: Tensor,
    mass_S1: Tensor,
    uniform_S: Tensor,
    best_S: Tensor,
    truncation: Truncation,
    *,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Token ids (S,), and whether ``count`` candidates were enough to know them (S,)."""
    vocab_size = weights_SV.shape[1]
    weights_SK, ids_SK = largest(weights_SV, count)
    columns_K = torch.arange(weights_SK.shape[1], device=weights_SV.device)
    in_top_k_SK = columns_K < truncation.top_k_S1
    weights_SK = torch.where(in_top_k_SK, weights_SK.clamp(min=0.0), 0.0).double()
    reached_SK = weights_SK.cumsum(-1)
    limited_S1 = truncation.top_k_S1 < vocab_size
    mass_S1 = torch.where(limited_S1, reached_SK[:, -1:], mass_S1)
    target_S1 = truncation.top_p_S1 * mass_S1
    kept_SK = reached_SK - weights_SK < target_S1
    kept_SK[:, 0] = True
    column_S, _ = _invert(weights_SK * kept_SK, uniform_S)
    picked_S1 = column_S[:, None]
    possible_S = weights_SK.gather(1, picked_S1)[:, 0] > 0
    complete = weights_SK.shape[1] >= vocab_size
    enough_S1 = limited_S1 | (reached_SK[:, -1:] >= target_S1) | ~(weights_SK[:, -1:] > 0)
    ids_S = torch.where(possible_S, ids_SK.gather(1, picked_S1)[:, 0], best_S)
    return ids_S, enough_S1[:, 0] | complete


def _invert(weights_RN: Tensor, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
    """The entry (R,) in which ``uniform_R`` of the total weight falls, and where in it, [0, 1).

    All float64. Trailing zeros change nothing, so N may differ from call to call.
    """
    reached_RN = weights_RN.cumsum(-1)
    target_R1 = uniform_R[:, None] * reached_RN[:, -1:]
    index_R1 = torch.searchsorted(reached_RN, target_R1, right=True)
    index_R1 = index_R1.clamp_(max=weights_RN.shape[1] - 1)
    weight_R1 = weights_RN.gather(1, index_R1)
    before_R1 = reached_RN.gather(1, index_R1) - weight_R1
    share_R1 = ((target_R1 - before_R1) / weight_R1).clamp_(0.0, 1.0 - 2.0**-53)
    return index_R1[:, 0], share_R1[:, 0]
