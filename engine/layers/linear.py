"""A matrix product: weights laid out once for this machine, rows that do not see each other.

With ``exact`` numerics a row's result is the same bits whatever the other rows are and however
many there are. A GEMM library chooses its kernel by the number of rows, so only a fixed list of
row counts (tile heights) is ever run, and a height is used only after it has been shown, in this
process and for this shape, to give the same bits as the reference height. Rows are padded with
zeros up to a height. ``fast`` runs whatever count comes. It does not know what is multiplied.
"""

# Shape suffixes: N rows   I input features   O output features

from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

Numerics = Literal["exact", "fast"]

REFERENCE_HEIGHT = 8
# Steps of at most 1.5, so padding wastes at most a third of the work.
TILE_HEIGHTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)

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
        self.dtype = weight_OI.dtype
        self.device = weight_OI.device
        self.numerics = numerics
        self._bias_O = bias_O
        self._packed = _can_pack(weight_OI)
        self._weight = _pack(weight_OI) if self._packed else weight_OI
        self._tiles = _tiles_of(
            self.out_features, self.in_features, self.dtype, self.device, torch.get_num_threads()
        )

    def __call__(self, x_NI: Tensor) -> Tensor:
        """(N, O); N may be 0."""
        if x_NI.shape[0] == 0:
            return x_NI.new_empty((0, self.out_features))
        if self.numerics == "fast":
            return self._multiply(x_NI)
        return self._multiply_in_tiles(x_NI)

    def _multiply(self, x_NI: Tensor) -> Tensor:
        if self._packed:
            out_NO: Tensor = _onednn._linear_pointwise(
                x_NI, self._weight, self._bias_O, "none", [], ""
            )
            return out_NO
        return functional.linear(x_NI, self._weight, self._bias_O)

    def _multiply_in_tiles(self, x_NI: Tensor) -> Tensor:
        num_rows = x_NI.shape[0]
        height = self._height_for(num_rows)
        if height == num_rows:
            return self._multiply(x_NI)
        if height > num_rows:
            return self._multiply(functional.pad(x_NI, (0, 0, 0, height - num_rows)))[:num_rows]
        parts = [self._multiply_in_tiles(part) for part in torch.split(x_NI, height)]
        return torch.cat(parts)

    def _height_for(self, num_rows: int) -> int:
        """The smallest proven height that holds all rows, or the largest proven one."""
        chosen = self._tiles.chosen.get(num_rows)
        if chosen is None:
            fitting = (height for height in TILE_HEIGHTS if height >= num_rows)
            fallback = (height for height in reversed(TILE_HEIGHTS) if height < num_rows)
            chosen = next(height for height in (*fitting, *fallback) if self._same_bits(height))
            self._tiles.chosen[num_rows] = chosen
        return chosen

    def _same_bits(self, height: int) -> bool:
        """Does a tile of ``height`` give what reference tiles give, row by row? Asked once."""
        proven = self._tiles.proven
        if height not in proven:
            proven[height] = height == REFERENCE_HEIGHT or self._compare_to_reference(height)
        return proven[height]

    def _compare_to_reference(self, height: int) -> bool:
        generator = torch.Generator().manual_seed(height)
        rows = max(height, REFERENCE_HEIGHT)
        x_NI = torch.randn(rows, self.in_features, generator=generator)
        x_NI = x_NI.to(device=self.device, dtype=self.dtype)
        got_NO = self._multiply(x_NI[:height].contiguous())
        starts = {0, (rows - REFERENCE_HEIGHT) // 2, rows - REFERENCE_HEIGHT}
        for start in starts:
            tile_NI = x_NI[start : start + REFERENCE_HEIGHT].contiguous()
            want_NO = self._multiply(tile_NI)[: max(height - start, 0)]
            if not torch.equal(got_NO[start : start + want_NO.shape[0]], want_NO):
                return False
        return True


class _Tiles:
    """What this process has found out about one GEMM shape; all layers of the shape share it."""

    def __init__(self) -> None:
        self.proven: dict[int, bool] = {}
        self.chosen: dict[int, int] = {}


@cache
def _tiles_of(
    _out_features: int,
    _in_features: int,
    _dtype: torch.dtype,
    _device: torch.device,
    _num_threads: int,
) -> _Tiles:
    return _Tiles()


def _can_pack(weight_OI: Tensor) -> bool:
    if weight_OI.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight_OI.dtype == torch.bfloat16:
        return bool(_onednn._is_mkldnn_bf16_supported())
    return weight_OI.dtype == torch.float32


def _pack(weight_OI: Tensor) -> Tensor:
    packed: Tensor = _onednn._reorder_linear_weight(weight_OI.contiguous(), REFERENCE_HEIGHT)
    return packed
