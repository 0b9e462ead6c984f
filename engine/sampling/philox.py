"""Counter-based random numbers: Philox4x32-10, vectorised over any shape, on any device.

The numbers of a token depend on (seed, choice, token index) alone, so a request draws the same on
every worker and beside any batch-mates. There is no state, and sampling is not known here.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Four 32-bit words for each counter (..., 4) and key (..., 2), all int64 in [0, 2^32)."""
    multiplier = counter.new_tensor(MULTIPLIERS)
    bump = key.new_tensor(WEYL)
    even, odd = counter[..., 0::2], counter[..., 1::2]
    for _ in range(ROUNDS):
        product = even * multiplier  # wraps modulo 2^64, so all 64 bits are right
        high, low = (product >> 32) & MASK, product & MASK
        even, odd = high.flip(-1) ^ odd ^ key, low.flip(-1)
        key = (key + bump) & MASK
    return torch.stack((even, odd), dim=-1).flatten(-2)


def uniform(seed: Tensor, choice: Tensor, token_index: Tensor) -> Tensor:
    """Numbers in [0, 1) with 53 random bits, float64, of the arguments' broadcast shape.

    ``seed`` is any int64 (the bits are the key); ``choice`` and ``token_index`` are below 2^32.
    """
    unused = torch.zeros_like(seed + choice + token_index)
    seed = seed + unused
    counter = torch.stack((token_index + unused, choice + unused, unused, unused), dim=-1)
    words = philox4x32(counter, torch.stack((seed & MASK, (seed >> 32) & MASK), dim=-1))
    mantissa = ((words[..., 0] >> 5) << 26) | (words[..., 1] >> 6)
    return mantissa.double() * 2.0**-53
