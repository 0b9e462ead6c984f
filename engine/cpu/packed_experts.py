"""Kernels for experts whose bf16 weights lie in tiles (``packed_weights``).

A work item is a tile of one slot: its weights come from memory once, whatever rows want them. The
arguments are those of ``experts``' other kernels: rows in the order of their slots, weights, where
each slot's rows begin, the number of slots, results, a workspace.
"""

from functools import cache
from typing import Any

from engine.cpu.packed_weights import MOST_ROWS, TILE, TILE_PAIR_BYTES, multiply_block
from engine.cpu.products import gate_rows
from engine.cpu.threads import Kernel, end_item, first_item, own_part
from engine.cpu.values import BFLOAT16, FLOAT32, load_integer

WORK_FLOATS = 2 * MOST_ROWS * TILE  # of each thread: gates, ups
_ROW_BYTES = 4 * TILE


@cache
def gate_up_kernel(hidden: int, width: int) -> Kernel:
    """``silu(gate(x)) * up(x)`` of every row. Both sizes are multiples of ``TILE``."""
    tiles, pairs = width // TILE, hidden // 2
    tile_bytes = pairs * TILE_PAIR_BYTES

    def gate_up(arguments: Any) -> None:
        x, weights, starts, out = arguments[0], arguments[1], arguments[2], arguments[4]
        gates = own_part(arguments[5], 4 * WORK_FLOATS)
        ups = gates + MOST_ROWS * _ROW_BYTES
        for item in range(first_item(arguments[3] * tiles), end_item(arguments[3] * tiles)):
            slot, tile = item // tiles, item % tiles
            gate = weights + (2 * slot * tiles + tile) * tile_bytes
            end = load_integer(starts, slot + 1)
            for row in range(load_integer(starts, slot), end, MOST_ROWS):
                rows, mine = min(MOST_ROWS, end - row), x + 2 * row * hidden
                up = gate + tiles * tile_bytes
                multiply_block(mine, 2 * hidden, rows, gate, pairs, gates, _ROW_BYTES, FLOAT32)
                multiply_block(mine, 2 * hidden, rows, up, pairs, ups, _ROW_BYTES, FLOAT32)
                for number in range(rows):
                    offset = number * _ROW_BYTES
                    target = out + 2 * ((row + number) * width + tile * TILE)
                    gate_rows(gates + offset, ups + offset, TILE, target, FLOAT32, BFLOAT16)

    return Kernel(gate_up, (hidden, width))


@cache
def down_kernel(hidden: int, width: int) -> Kernel:
    """The last product of every row. Both sizes are multiples of ``TILE``."""
    tiles, pairs = hidden // TILE, width // 2
    tile_bytes = pairs * TILE_PAIR_BYTES

    def down(arguments: Any) -> None:
        x, weights, starts, out = arguments[0], arguments[1], arguments[2], arguments[4]
        for item in range(first_item(arguments[3] * tiles), end_item(arguments[3] * tiles)):
            slot, tile = item // tiles, item % tiles
            end = load_integer(starts, slot + 1)
            for row in range(load_integer(starts, slot), end, MOST_ROWS):
                multiply_block(
                    x + 2 * row * width, 2 * width, min(MOST_ROWS, end - row),
                    weights + item * tile_bytes, pairs,
                    out + 2 * (row * hidden + tile * TILE), 2 * hidden, BFLOAT16,
                )  # fmt: skip

    return Kernel(down, (hidden, width))
