"""Products of a few rows with a tile of weight rows, as float32: what GEMM kernels are made of.

The fewer rows there are, the more weight rows are in a register block, so that even one row keeps
the multipliers busy. Which block a result comes from does not change it.
"""

from typing import Any

from numba import njit

from engine.cpu.products import dot_rows
from engine.cpu.values import ELEMENT_BYTES

TILE = 64  # weight rows
TILE_ROWS = 4
TILE_FLOATS = TILE * TILE_ROWS  # what one call gives
_BLOCKS = ((1, 16), (2, 8), (3, 4), (TILE_ROWS, 4))  # rows and weight rows of a register block


def tile_products(length: int, format_: int) -> Any:
    """For kernels: ``(left, stride, rows, right, columns, out)``.

    ``rows`` from 1 to ``TILE_ROWS`` of ``length`` elements, ``stride`` bytes apart, times
    ``columns`` contiguous weight rows, a multiple of 16 up to ``TILE``; ``out`` is (rows, TILE).
    """
    single, double, triple, full = (
        _block_products(length, format_, rows, columns) for rows, columns in _BLOCKS
    )

    @njit(inline="always")
    def multiply(left: int, stride: int, rows: int, right: int, columns: int, out: int) -> None:
        if rows == TILE_ROWS:
            full(left, stride, right, columns, out)
        elif rows > 2:  # noqa: PLR2004
            triple(left, stride, right, columns, out)
        elif rows > 1:
            double(left, stride, right, columns, out)
        else:
            single(left, stride, right, columns, out)

    return multiply


def _block_products(length: int, format_: int, rows: int, columns: int) -> Any:
    row_bytes, out_bytes = length * ELEMENT_BYTES[format_], 4 * TILE

    @njit(inline="always")
    def multiply(left: int, stride: int, right: int, count: int, out: int) -> None:
        for c in range(0, count, columns):
            dot_rows(
                left, stride, right + c * row_bytes, row_bytes, length,
                out + 4 * c, out_bytes, format_, rows, columns,
            )  # fmt: skip

    return multiply
