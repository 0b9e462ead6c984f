"""Row orders of projections whose outputs are rotated by position.

Shape suffixes: P projection rows, heads * W   W rows of a head   D hidden
"""

import torch
from torch import Tensor


def half_split_rows(weight_PD: Tensor, *, heads: int) -> Tensor:
    """A copy with each head's rows moved from pairs (0 1, 2 3, ...) to halves (0 2 ..., 1 3 ...).

    A head of width W then rotates dimension i with i + W / 2 instead of 2i with 2i + 1.
    """
    rows_per_head = weight_PD.shape[0] // heads
    order_W = torch.arange(rows_per_head).view(-1, 2).t().reshape(-1)
    order_P = (torch.arange(heads).unsqueeze(1) * rows_per_head + order_W).reshape(-1)
    return weight_PD[order_P.to(weight_PD.device)]
