"""What of a token's row travels: its values as they are, in bfloat16, or in 8 bits with scales.

``fp8`` is E4M3 with one fp32 scale for each 128 values of a row, the block format of DeepSeek-V3
(arXiv 2412.19437, 3.3). A row's scales depend on that row alone. Who sends what where is unknown
here.

Shape suffixes: T tokens   D model width   G groups of values that share a scale   M values of one
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.experts.buffers import ExchangeShape, Payload

_GROUP = ExchangeShape.SCALED_TOGETHER
_FP8 = torch.float8_e4m3fn
_FP8_MOST = 448.0  # torch.finfo(_FP8).max
# Values that are not finite stay what they are in the row that has them, and only there.
_LEAST_SCALE = 1e-12


def encode(x_TD: Tensor, payload: Payload) -> tuple[Tensor, ...]:
    """The tensors that travel, (T, *) each."""
    if payload == "bf16":
        return (x_TD.to(torch.bfloat16),)
    if payload == "fp8":
        x_TGM = x_TD.float().view(len(x_TD), x_TD.shape[1] // _GROUP, _GROUP)
        scale_TG = (x_TGM.abs().amax(dim=2) / _FP8_MOST).clamp_min(_LEAST_SCALE)
        values_TD = (x_TGM / scale_TG.unsqueeze(2)).flatten(1).to(_FP8)
        return values_TD, scale_TG
    return (x_TD,)


def decode(travelled: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(T, D) in ``dtype`` of what ``encode`` gave."""
    if len(travelled) == 1:
        return travelled[0].to(dtype)
    values_TD, scale_TG = travelled
    x_TGM = values_TD.float().view(*scale_TG.shape, _GROUP) * scale_TG.unsqueeze(2)
    return x_TGM.flatten(1).to(dtype)
