"""Whatever heights a machine's kernels agree on, rows keep the bits of the reference height."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.exact import HEIGHTS, REFERENCE_HEIGHT, RowTiles


@given(
    agreeing=st.sets(st.sampled_from(HEIGHTS)),
    counts=st.lists(st.integers(1, 1200), min_size=1, max_size=6),
)
def test_only_agreeing_heights_are_used_for_any_number_of_rows(
    agreeing: set[int], counts: list[int]
) -> None:
    def product(x_NI: Tensor) -> Tensor:
        """Another kernel's rounding is an offset of its own."""
        height = x_NI.shape[0]
        exact = height == REFERENCE_HEIGHT or height in agreeing
        return 2 * x_NI + (0 if exact else height)

    tiles = RowTiles(lambda rows: (torch.ones(rows, 2), product))
    for count in counts:
        x_NI = torch.arange(2.0 * count).view(count, 2)
        assert torch.equal(tiles.multiply(x_NI, product), 2 * x_NI)
