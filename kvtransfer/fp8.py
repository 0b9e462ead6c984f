"""KV as 8-bit floats on the way, about half of bfloat16's bytes: one scale for each row.

A row is ``key_width`` elements: a token's key or value of one head, or its latent. An element comes
back with an error of at most 1/16 of itself or 2^-10 / 448 of its row's largest, whichever is more
(e4m3: three bits of mantissa, and subnormals). A row with something that is not finite comes back
as NaN, and so spoils its own request and no other.
"""

# Shape suffixes: R rows   D row width   X bytes

import torch
from torch import Tensor

from protocol.kv import DTYPE_BYTES, KVLayout

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LARGEST = 448.0  # of e4m3
_SCALE_BYTES = 4


def packed_bytes(layout: KVLayout, num_bytes: int) -> int:
    """What ``num_bytes`` of KV take when packed."""
    rows = num_bytes // (layout.key_width * DTYPE_BYTES[layout.dtype])
    return rows * (_SCALE_BYTES + layout.key_width)


def pack(layout: KVLayout, contents_X: Tensor) -> Tensor:
    """Whole rows as uint8, in any number: their scales, then their elements, as uint8."""
    rows_RD = contents_X.view(_DTYPES[layout.dtype]).view(-1, layout.key_width).float()
    scale_R = rows_RD.abs().amax(1) / _LARGEST
    scale_R = torch.where(scale_R == 0, torch.ones_like(scale_R), scale_R)
    elements_RD = (rows_RD / scale_R[:, None]).clamp(-_LARGEST, _LARGEST)
    packed_RD = elements_RD.to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.cat([scale_R.view(torch.uint8), packed_RD.flatten()])


def unpack(layout: KVLayout, packed_X: Tensor) -> Tensor:
    """What ``pack`` got, but for rounding.

    Raises:
        ValueError: not a whole number of packed rows.
    """
    rows, rest = divmod(packed_X.numel(), _SCALE_BYTES + layout.key_width)
    if rest:
        raise ValueError(f"{packed_X.numel()} bytes are not whole rows of {layout.key_width}")
    scale_R = packed_X[: rows * _SCALE_BYTES].view(torch.float32)
    elements_RD = packed_X[rows * _SCALE_BYTES :].view(torch.float8_e4m3fn)
    rows_RD = elements_RD.view(rows, layout.key_width).float() * scale_R[:, None]
    return rows_RD.to(_DTYPES[layout.dtype]).flatten().view(torch.uint8)
