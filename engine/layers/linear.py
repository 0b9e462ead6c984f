"""A matrix product with weights that are laid out once for this machine.

With ``exact`` numerics a row's result is the same bits whatever the other rows are and however
many there are (``engine.exact``); ``fast`` multiplies whatever comes in one product.
"""

# Shape suffixes: N rows   I input features   O output features

from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from engine.cpu import packed_weights
from engine.exact import REFERENCE_HEIGHT, Product, RowTiles, cancelling

Numerics = Literal["exact", "fast"]

_DISTINCT_OUTPUTS = 512  # of a probe; more of them are the same again

_onednn: Any = torch.ops.mkldnn


class Linear:
    """``x_NI @ weight_OI.T`` in the weight's dtype, on the weight's device.

    On a CPU the weight is copied into another layout and the argument is not kept, so a caller
    that drops it too holds the weight once.
    """

    def __init__(self, weight_OI: Tensor, *, numerics: Numerics) -> None:
        self.out_features, self.in_features = weight_OI.shape
        self._multiply, independent = _product_with(weight_OI)
        self._tiles = None
        if numerics == "exact" and not independent:
            self._tiles = _tiles_of(weight_OI)

    def __call__(self, x_NI: Tensor) -> Tensor:
        """(N, O); N may be 0."""
        if x_NI.shape[0] == 0:
            return x_NI.new_empty((0, self.out_features))
        if self._tiles is None:
            return self._multiply(x_NI)
        return self._tiles.multiply(x_NI, self._multiply)


def _product_with(weight_OI: Tensor) -> tuple[Product, bool]:
    """The fastest product there is here, and whether its rows are independent by themselves."""
    if packed_weights.serves(weight_OI):
        packed = packed_weights.pack(weight_OI)
        multiply = partial(
            packed_weights.multiply, packed_TPJ2=packed, out_features=weight_OI.shape[0]
        )
        return multiply, True
    if _onednn_serves(weight_OI):
        reordered = _onednn._reorder_linear_weight(weight_OI.contiguous(), REFERENCE_HEIGHT)
        return partial(_multiply_by_onednn, reordered), False
    return partial(functional.linear, weight=weight_OI), False


def _multiply_by_onednn(weight: Tensor, x_NI: Tensor) -> Tensor:
    out_NO: Tensor = _onednn._linear_pointwise(x_NI, weight, None, "none", [], "")
    return out_NO


def _onednn_serves(weight_OI: Tensor) -> bool:
    if weight_OI.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight_OI.dtype == torch.bfloat16:
        return bool(_onednn._is_mkldnn_bf16_supported())
    return weight_OI.dtype == torch.float32


def _tiles_of(weight_OI: Tensor) -> RowTiles:
    return _shared_tiles(
        weight_OI.shape[0],
        weight_OI.shape[1],
        weight_OI.dtype,
        weight_OI.device,
        torch.get_num_threads(),
    )


@cache
def _shared_tiles(
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    device: torch.device,
    _num_threads: int,  # kernels differ by it too
) -> RowTiles:
    def probe(num_rows: int) -> tuple[Tensor, Product]:
        distinct = min(out_features, _DISTINCT_OUTPUTS)
        x_NI, weight_OI = cancelling((num_rows, in_features), (distinct, in_features))
        weight_OI = weight_OI.to(dtype)[torch.arange(out_features) % distinct]
        linear = Linear(weight_OI.to(device), numerics="fast")
        return x_NI.to(device=device, dtype=dtype), linear

    return RowTiles(probe)
