"""Products whose rows do not see each other: the same bits whatever the other rows are.

A GEMM library chooses its kernel by the number of rows, and another kernel may add in another
order. So only a fixed list of row counts (tile heights) is ever run, and a height only after it has
been shown, in this process and for this shape, to give the bits of the reference height at every
place in a tile. Rows are padded with zeros up to a height. What is multiplied is not known here.
"""

# Shape suffixes: Z leading dimensions   N rows   I input features   O output features

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

Product = Callable[[Tensor], Tensor]  # (*Z, N, I) -> (*Z, N, O), each row from its own row
Probe = Callable[[int], tuple[Tensor, Product]]  # given N

REFERENCE_HEIGHT = 8
# Steps of at most 1.5 as far as decode goes, so that padding wastes at most a third of the work;
# beyond, padding is better than to cut rows up and join them again.
HEIGHTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
_LONGEST_PADDED = 512
PROVEN_TOGETHER = HEIGHTS[:12]  # at first use: all heights of decode, so none stalls it later


class RowTiles:
    """The heights that have been tried for one shape; all products of that shape share it.

    ``probe`` makes rows (*Z, N, I), and a product of the shape in question, from ``cancelling``:
    results that are nothing but rounding differ when the order of a sum does, even in a dtype that
    is too coarse to show it in ordinary results.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._proven = {REFERENCE_HEIGHT: True}
        self._chosen: dict[int, int] = {}

    def multiply(self, x_ZNI: Tensor, product: Product) -> Tensor:
        """``product(x)``, its rows independent of each other; N is at least 1."""
        num_rows = x_ZNI.shape[-2]
        height = self._chosen.get(num_rows) or self._choose(num_rows)
        if height == num_rows:
            return product(x_ZNI)
        if height > num_rows:
            padded_ZNI = functional.pad(x_ZNI, (0, 0, 0, height - num_rows))
            return product(padded_ZNI).narrow(-2, 0, num_rows)
        parts = torch.split(x_ZNI, height, dim=-2)
        return torch.cat([self.multiply(part, product) for part in parts], dim=-2)

    def _choose(self, num_rows: int) -> int:
        """The smallest proven height that holds all rows, or else the largest proven one."""
        holding = [
            height for height in HEIGHTS if height >= num_rows and _wastes_little(height, num_rows)
        ]
        smaller = [height for height in reversed(HEIGHTS) if height < num_rows]
        self._prove(PROVEN_TOGETHER)
        if num_rows > PROVEN_TOGETHER[-1]:
            self._prove((*smaller, *holding[:1]))
        chosen = next(height for height in (*holding, *smaller) if self._proven.get(height))
        self._chosen[num_rows] = chosen
        return chosen

    def _prove(self, heights: Sequence[int]) -> None:
        untried = [height for height in heights if height not in self._proven]
        if untried:
            x_ZNI, product = self._probe(max(*untried, REFERENCE_HEIGHT))
            for height in untried:
                self._proven[height] = _agrees_with_reference(height, x_ZNI, product)


def _wastes_little(height: int, num_rows: int) -> bool:
    """Rather than pad a long chunk by more than half, it is cut up."""
    return height <= _LONGEST_PADDED or 2 * height <= 3 * num_rows


def _agrees_with_reference(height: int, x_ZNI: Tensor, product: Product) -> bool:
    got_ZNO = product(x_ZNI.narrow(-2, 0, height).contiguous())
    last = max(height - REFERENCE_HEIGHT, 0)
    for start in {0, last // 2, last}:
        count = min(REFERENCE_HEIGHT, height - start)
        tile_ZNI = x_ZNI.narrow(-2, start, REFERENCE_HEIGHT).contiguous()
        want_ZNO = product(tile_ZNI).narrow(-2, 0, count)
        if not torch.equal(got_ZNO.narrow(-2, start, count), want_ZNO):
            return False
    return True


def cancelling(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Float32 tensors of these shapes whose dot products along their last dimension are zero.

    Every term has its negative at a random place, so what a dot product leaves is rounding.
    """
    size = left[-1]
    generator = torch.Generator().manual_seed(size)
    order_I = torch.randperm(size, generator=generator)
    sign_I = torch.ones(size)
    sign_I[size // 2 : size // 2 * 2] = -1
    sign_I[size // 2 * 2 :] = 0

    def paired(shape: tuple[int, ...]) -> Tensor:
        half = torch.randn((*shape[:-1], size // 2), generator=generator)
        return torch.cat((half, half, torch.zeros((*shape[:-1], size % 2))), -1)[..., order_I]

    return paired(left), paired(right) * sign_I[order_I]
