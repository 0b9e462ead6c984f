"""Root-mean-square normalisation, row by row: no row's result depends on another row."""

# Shape suffixes: N rows   D features

import torch
from torch import Tensor


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension; the mean is in float32.

    The quotient is rounded to the dtype of ``x_ND`` before the weight is applied, as in the
    reference models (Zhang and Sennrich, arXiv:1910.07467).
    """
    x32_ND = x_ND.float()
    scale_N1 = torch.rsqrt(x32_ND.square().mean(-1, keepdim=True) + eps)
    return (x32_ND * scale_N1).to(x_ND.dtype) * weight_D


def add_rms_norm(
    x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(norm of ``x + residual``, ``x + residual``)."""
    residual_ND = x_ND + residual_ND
    return rms_norm(residual_ND, weight_D, eps), residual_ND
