"""What a step does between products, row by row: norms and the gated activation.

Each is several operations in PyTorch, whose cost for a few rows is that of calling them. A row's
result depends on that row alone.
"""

# Shape suffixes: N rows   D features   J gate and up columns, all gates first   F half of them

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from engine.cpu.products import gate_rows
from engine.cpu.threads import Kernel, end_item, first_item
from engine.cpu.values import ELEMENT_BYTES, FORMATS, bits_of, float_of, load, store
from engine.cpu.vectors import LANES

_SHARED_ELEMENTS = 2**15  # below, waking threads takes longer than the work


def serves_norm(x_ND: Tensor, weight_D: Tensor) -> bool:
    """Whether the norms can read these."""
    return (
        x_ND.device.type == "cpu"
        and x_ND.dtype in FORMATS
        and weight_D.dtype == x_ND.dtype
        and x_ND.dim() == weight_D.dim() + 1
        and x_ND.stride(1) == 1
    )


def serves_gate(gate_up_NJ: Tensor) -> bool:
    """Whether ``silu_and_mul`` can read this."""
    return (
        gate_up_NJ.device.type == "cpu"
        and gate_up_NJ.dtype in FORMATS
        and gate_up_NJ.shape[1] % (2 * LANES) == 0
        and gate_up_NJ.is_contiguous()
    )


def prepare(norm_widths: Iterable[int], gate_widths: Iterable[int], dtype: torch.dtype) -> None:
    """Compile for rows of these many features and hidden units."""
    for width in norm_widths:
        _norm_kernel(width, FORMATS[dtype])
        _add_norm_kernel(width, FORMATS[dtype])
    for width in gate_widths:
        if width % LANES == 0:
            _gate_kernel(width, FORMATS[dtype])


def norm_row(width: int, format_: int) -> Any:
    """For kernels: ``(source, weight, epsilon, target)``, the RMS norm of a row, also in place."""

    @njit(inline="always")
    def norm(source: int, weight: int, epsilon: float, target: int) -> None:
        total = np.float32(0.0)
        for d in range(width):
            element = load(source, d, format_)
            total += element * element
        factor = np.float32(1.0) / np.float32(math.sqrt(total / width + epsilon))
        for d in range(width):
            store(target, d, load(source, d, format_) * factor * load(weight, d, format_), format_)

    return norm


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight``; rows of ``x`` may be any distance apart."""
    num_rows, width = x_ND.shape
    out_ND = x_ND.new_empty((num_rows, width))
    _norm_kernel(width, FORMATS[x_ND.dtype])(
        x_ND.data_ptr(),
        x_ND.stride(0) * x_ND.element_size(),
        weight_D.data_ptr(),
        out_ND.data_ptr(),
        num_rows,
        bits_of(eps),
        threads=_threads(out_ND),
    )
    return out_ND


def add_rms_norm(
    x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(norm of ``x + residual``, ``x + residual``), both contiguous as the arguments are."""
    out_ND, sum_ND = torch.empty_like(x_ND), torch.empty_like(x_ND)
    _add_norm_kernel(x_ND.shape[1], FORMATS[x_ND.dtype])(
        x_ND.data_ptr(),
        residual_ND.data_ptr(),
        weight_D.data_ptr(),
        out_ND.data_ptr(),
        sum_ND.data_ptr(),
        x_ND.shape[0],
        bits_of(eps),
        threads=_threads(out_ND),
    )
    return out_ND, sum_ND


def silu_and_mul(gate_up_NJ: Tensor) -> Tensor:
    """``silu(gate) * up``, (N, F), for contiguous rows."""
    num_rows, width = gate_up_NJ.shape[0], gate_up_NJ.shape[1] // 2
    out_NF = gate_up_NJ.new_empty((num_rows, width))
    _gate_kernel(width, FORMATS[gate_up_NJ.dtype])(
        gate_up_NJ.data_ptr(), out_NF.data_ptr(), num_rows, threads=_threads(out_NF)
    )
    return out_NF


def _threads(out: Tensor) -> int:
    return torch.get_num_threads() if out.numel() > _SHARED_ELEMENTS else 1


@cache
def _norm_kernel(width: int, format_: int) -> Kernel:
    row_bytes = width * ELEMENT_BYTES[format_]
    norm_one = norm_row(width, format_)

    def norm(arguments: Any) -> None:
        weight, eps = arguments[2], float_of(arguments[5])
        for n in range(first_item(arguments[4]), end_item(arguments[4])):
            row, out = arguments[0] + n * arguments[1], arguments[3] + n * row_bytes
            norm_one(row, weight, eps, out)

    return Kernel(norm, (width, format_))


@cache
def _add_norm_kernel(width: int, format_: int) -> Kernel:
    row_bytes = width * ELEMENT_BYTES[format_]
    norm_one = norm_row(width, format_)

    def add_norm(arguments: Any) -> None:
        weight, eps = arguments[2], float_of(arguments[6])
        for n in range(first_item(arguments[5]), end_item(arguments[5])):
            row, residual = arguments[0] + n * row_bytes, arguments[1] + n * row_bytes
            out, added = arguments[3] + n * row_bytes, arguments[4] + n * row_bytes
            for d in range(width):
                store(added, d, load(row, d, format_) + load(residual, d, format_), format_)
            norm_one(added, weight, eps, out)

    return Kernel(add_norm, (width, format_))


@cache
def _gate_kernel(width: int, format_: int) -> Kernel:
    row_bytes = width * ELEMENT_BYTES[format_]

    def gate(arguments: Any) -> None:
        for n in range(first_item(arguments[2]), end_item(arguments[2])):
            gates = arguments[0] + 2 * n * row_bytes
            out = arguments[1] + n * row_bytes
            gate_rows(gates, gates + row_bytes, width, out, format_, format_)

    return Kernel(gate, (width, format_))
