"""The Triton kernel that copies scattered blocks to a row or back, for ``kvtransfer.gather``."""

# Shape suffixes: M layers   B blocks of the pool   N blocks   W words

import triton
import triton.language as tl
from torch import Tensor

from kvtransfer.gather import words

TILE_WORDS = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _copy(  # type: ignore[no-untyped-def]  # noqa: PLR0917  Triton types its arguments
    pages,
    index,
    row,
    page_layer_stride,
    page_block_stride,
    row_layer_stride,
    row_block_stride,
    num_words,
    TO_ROW: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of one block of one layer. Strides and sizes are in words."""
    number, layer = tl.program_id(1), tl.program_id(2)
    block = tl.load(index + number).to(tl.int64)
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = at < num_words
    layer = layer.to(tl.int64)
    in_pages = pages + layer * page_layer_stride + block * page_block_stride + at
    in_row = row + layer * row_layer_stride + number.to(tl.int64) * row_block_stride + at
    if TO_ROW:
        tl.store(in_row, tl.load(in_pages, mask=mask), mask=mask)
    else:
        tl.store(in_pages, tl.load(in_row, mask=mask), mask=mask)


def copy_blocks(pages_MBX: Tensor, index_N: Tensor, row_MNX: Tensor, *, to_row: bool) -> None:
    """Between blocks ``index_N`` of the pages and a row of as many, on the current stream."""
    pages_MBW, row_MNW = words(pages_MBX, row_MNX)
    num_words = pages_MBW.shape[2]
    grid = (triton.cdiv(num_words, TILE_WORDS), index_N.numel(), pages_MBW.shape[0])
    if not all(grid):
        return
    _copy[grid](
        pages_MBW,
        index_N,
        row_MNW,
        pages_MBW.stride(0),
        pages_MBW.stride(1),
        row_MNW.stride(0),
        row_MNW.stride(1),
        num_words,
        TO_ROW=to_row,
        TILE=TILE_WORDS,
    )
