"""Root-mean-square normalisation, row by row: no row's result depends on another row."""

# Shape suffixes: N rows, one or more dimensions   D features

from torch import Tensor
from torch.nn import functional

from engine.cpu import rows


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, float32 inside.

    Source: Zhang and Sennrich, arXiv:1910.07467.
    """
    if rows.serves_norm(x_ND, weight_D):
        return rows.rms_norm(x_ND, weight_D, eps)
    return functional.rms_norm(x_ND, weight_D.shape, weight_D, eps)


def add_rms_norm(
    x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(norm of ``x + residual``, ``x + residual``)."""
    if rows.serves_norm(x_ND, weight_D) and x_ND.is_contiguous() and residual_ND.is_contiguous():
        return rows.add_rms_norm(x_ND, residual_ND, weight_D, eps)
    residual_ND = x_ND + residual_ND
    return rms_norm(residual_ND, weight_D, eps), residual_ND
