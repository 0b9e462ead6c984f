"""A matrix product with weights that are laid out once for this machine.

With ``exact`` numerics a row's result is the same bits whatever the other rows are and however
many there are (``engine.exact``); ``fast`` multiplies whatever comes in one product.
"""

# Shape suffixes: N rows   I input features   O output features

from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from engine.exact import REFERENCE_HEIGHT, Product, RowTiles, cancelling

Numerics = Literal["exact", "fast"]

_DISTINCT_OUTPUTS = 512  # of a probe; more of them are the same again

_onednn: Any = torch.ops.mkldnn


class Linear:
    """``x_NI @ weight_OI.T + bias_O`` in the weight's dtype, on the weight's device.

    On a CPU the weight is copied into oneDNN's blocked layout and the argument is not kept, so a
    caller that drops it too holds the weight once.
    """

    def __init__(
        self, weight_OI: Tensor, bias_O: Tensor | None = None, *, numerics: Numerics
    ) -> None:
        self.out_features, self.in_features = weight_OI.shape
        self._bias_O = bias_O
        self._packed = _can_pack(weight_OI)
        self._weight = _pack(weight_OI) if self._packed else weight_OI
        self._tiles = _tiles_of(weight_OI, bias_O) if numerics == "exact" else None

    def __call__(self, x_NI: Tensor) -> Tensor:
        """(N, O); N may be 0."""
        if x_NI.shape[0] == 0:
            return x_NI.new_empty((0, self.out_features))
        if self._tiles is None:
            return self._multiply(x_NI)
        return self._tiles.multiply(x_NI, self._multiply)

    def _multiply(self, x_NI: Tensor) -> Tensor:
        if self._packed:
            out_NO: Tensor = _onednn._linear_pointwise(
                x_NI, self._weight, self._bias_O, "none", [], ""
            )
            return out_NO
        return functional.linear(x_NI, self._weight, self._bias_O)


def _can_pack(weight_OI: Tensor) -> bool:
    if weight_OI.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight_OI.dtype == torch.bfloat16:
        return bool(_onednn._is_mkldnn_bf16_supported())
    return weight_OI.dtype == torch.float32


def _pack(weight_OI: Tensor) -> Tensor:
    packed: Tensor = _onednn._reorder_linear_weight(weight_OI.contiguous(), REFERENCE_HEIGHT)
    return packed


def _tiles_of(weight_OI: Tensor, bias_O: Tensor | None) -> RowTiles:
    return _shared_tiles(
        weight_OI.shape[0],
        weight_OI.shape[1],
        weight_OI.dtype,
        weight_OI.device,
        bias_O is not None,
        torch.get_num_threads(),
    )


@cache
def _shared_tiles(
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    device: torch.device,
    has_bias: bool,
    _num_threads: int,  # kernels differ by it too
) -> RowTiles:
    def probe(num_rows: int) -> tuple[Tensor, Product]:
        distinct = min(out_features, _DISTINCT_OUTPUTS)
        x_NI, weight_OI = cancelling((num_rows, in_features), (distinct, in_features))
        weight_OI = weight_OI.to(dtype)[torch.arange(out_features) % distinct]
        bias_O = torch.zeros(out_features, device=device, dtype=dtype) if has_bias else None
        linear = Linear(weight_OI.to(device), bias_O, numerics="fast")
        return x_NI.to(device=device, dtype=dtype), linear

    return RowTiles(probe)
