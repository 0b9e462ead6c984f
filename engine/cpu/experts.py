"""The experts of one rank applied to rows: each weight is read once for all rows that want it.

A row's result depends on that row and its expert alone, whatever other rows are there: sums are
made by ``products.dot_rows``, or, where weights lie in tiles, by ``packed_weights``. So this serves
exact and fast numerics alike.

Hidden units are computed in tiles, gate and up together, and activated before they leave the
caches. A work item is a tile of one slot, and the sizes of tiles depend on the weights only.
"""

# Shape suffixes: S local expert slots   B rows of x   K chosen experts   P = B * K places
# D model width   I expert width

from functools import cache
from typing import Any

import torch
from torch import Tensor

from engine.cpu import packed_experts, packed_weights
from engine.cpu.products import ROW_STEP, gate_rows
from engine.cpu.threads import Kernel, end_item, first_item, own_part
from engine.cpu.tiles import TILE, TILE_FLOATS, TILE_ROWS, tile_products
from engine.cpu.values import (
    ELEMENT_BYTES,
    FLOAT32,
    FORMATS,
    load,
    load_integer,
    store,
    store_integer,
)

_WORK_FLOATS = 2 * TILE_FLOATS  # of each thread
_SHARED_ROWS = 2  # below, waking threads takes longer than the work


def serves(gate_up_SJD: Tensor, down_SDI: Tensor) -> bool:
    """Whether the kernels can read these weights."""
    return (
        gate_up_SJD.device.type == "cpu"
        and gate_up_SJD.dtype in FORMATS
        and gate_up_SJD.is_contiguous()
        and down_SDI.is_contiguous()
        and gate_up_SJD.shape[2] % ROW_STEP == 0
        and down_SDI.shape[2] % ROW_STEP == 0
    )


def prepare(hidden: int, width: int, dtype: torch.dtype) -> None:
    """Compile for experts of these sizes."""
    if serves_tiles(torch.device("cpu"), dtype, hidden, width):
        _sort_kernel(hidden, FORMATS[dtype])
        packed_experts.gate_up_kernel(hidden, width)
        packed_experts.down_kernel(hidden, width)
    elif hidden % ROW_STEP == 0 and width % ROW_STEP == 0:
        _sort_kernel(hidden, FORMATS[dtype])
        _gate_up_kernel(hidden, width, FORMATS[dtype])
        _down_kernel(hidden, width, FORMATS[dtype])


def serves_tiles(device: torch.device, dtype: torch.dtype, hidden: int, width: int) -> bool:
    """Whether experts of these sizes should lie in tiles (``packed_weights.in_tiles``) here."""
    return packed_weights.serves_as(device, dtype, hidden) and (
        hidden % packed_weights.TILE == 0 and width % packed_weights.TILE == 0
    )


def apply_experts(
    x_BD: Tensor,
    slot_BK: Tensor,
    gate_up_SJD: Tensor,
    down_SDI: Tensor,
    *,
    in_tiles: bool = False,
) -> tuple[Tensor, Tensor]:
    """``down(silu(gate(x)) * up(x))`` of row b by slot ``slot_BK[b, k]``, and where it is.

    ``in_tiles``: each slot's weights lie as ``packed_weights.in_tiles`` puts them.

    Returns:
        Results (P, D), and the place of each (B, K), which means nothing where the slot is -1.
    """
    x_BD, slot_BK = x_BD.contiguous(), slot_BK.contiguous()
    num_slots, double_width, hidden = gate_up_SJD.shape
    width, num_places, format_ = double_width // 2, slot_BK.numel(), FORMATS[x_BD.dtype]
    threads = torch.get_num_threads() if num_places > _SHARED_ROWS else 1
    starts = torch.empty(num_slots + 1, dtype=torch.int64)
    place_BK = torch.empty_like(slot_BK)
    x_PD = x_BD.new_empty((num_places, hidden))
    activated_PI = x_BD.new_empty((num_places, width))
    out_PD = x_BD.new_empty((num_places, hidden))
    if in_tiles:
        gate_up = packed_experts.gate_up_kernel(hidden, width)
        down = packed_experts.down_kernel(hidden, width)
        workspace = torch.empty(threads * packed_experts.WORK_FLOATS)
    else:
        gate_up = _gate_up_kernel(hidden, width, format_)
        down = _down_kernel(hidden, width, format_)
        workspace = torch.empty(threads * _WORK_FLOATS)
    _sort_kernel(hidden, format_)(
        x_BD.data_ptr(), slot_BK.data_ptr(), num_places, slot_BK.shape[1], num_slots,
        starts.data_ptr(), place_BK.data_ptr(), x_PD.data_ptr(),
    )  # fmt: skip
    gate_up(
        x_PD.data_ptr(), gate_up_SJD.data_ptr(), starts.data_ptr(), num_slots,
        activated_PI.data_ptr(), workspace.data_ptr(), threads=threads,
    )  # fmt: skip
    down(
        activated_PI.data_ptr(), down_SDI.data_ptr(), starts.data_ptr(), num_slots,
        out_PD.data_ptr(), workspace.data_ptr(), threads=threads,
    )  # fmt: skip
    return out_PD, place_BK


@cache
def _sort_kernel(hidden: int, format_: int) -> Kernel:
    """Rows in the order of their slots: where each slot's begin, where each went, and they."""
    row_bytes = hidden * ELEMENT_BYTES[format_]

    def sort(arguments: Any) -> None:
        x, slots, num_places, chosen = arguments[0], arguments[1], arguments[2], arguments[3]
        num_slots, starts, places, out = arguments[4], arguments[5], arguments[6], arguments[7]
        for slot in range(num_slots + 1):
            store_integer(starts, slot, 0)
        for place in range(num_places):
            slot = load_integer(slots, place)
            if slot >= 0:
                store_integer(starts, slot, load_integer(starts, slot) + 1)
        total = 0
        for slot in range(num_slots + 1):
            total += load_integer(starts, slot)
            store_integer(starts, slot, total)  # where the slot ends; filled from there backwards
        for place in range(num_places - 1, -1, -1):
            slot = load_integer(slots, place)
            number = 0
            if slot >= 0:
                number = load_integer(starts, slot) - 1
                store_integer(starts, slot, number)
                source, target = x + place // chosen * row_bytes, out + number * row_bytes
                for d in range(hidden):
                    store(target, d, load(source, d, format_), format_)
            store_integer(places, place, number)

    return Kernel(sort, (hidden, format_))


@cache
def _gate_up_kernel(hidden: int, width: int, format_: int) -> Kernel:
    size = ELEMENT_BYTES[format_]
    row_bytes, tiles = hidden * size, -(-width // TILE)
    multiply = tile_products(hidden, format_)

    def gate_up(arguments: Any) -> None:
        x, weights, starts = arguments[0], arguments[1], arguments[2]
        gates = own_part(arguments[5], 4 * _WORK_FLOATS)
        ups = gates + 4 * TILE_FLOATS
        for item in range(first_item(arguments[3] * tiles), end_item(arguments[3] * tiles)):
            slot, first = item // tiles, item % tiles * TILE
            units = min(TILE, width - first)
            gate = weights + (2 * slot * width + first) * row_bytes
            end = load_integer(starts, slot + 1)
            for row in range(load_integer(starts, slot), end, TILE_ROWS):
                rows = min(TILE_ROWS, end - row)
                multiply(x + row * row_bytes, row_bytes, rows, gate, units, gates)
                multiply(x + row * row_bytes, row_bytes, rows, gate + width * row_bytes, units, ups)
                for number in range(rows):
                    offset = 4 * number * TILE
                    out = arguments[4] + ((row + number) * width + first) * size
                    gate_rows(gates + offset, ups + offset, units, out, FLOAT32, format_)

    return Kernel(gate_up, (hidden, width, format_))


@cache
def _down_kernel(hidden: int, width: int, format_: int) -> Kernel:
    size = ELEMENT_BYTES[format_]
    row_bytes, tiles = width * size, -(-hidden // TILE)
    multiply = tile_products(width, format_)

    def down(arguments: Any) -> None:
        x, weights, starts = arguments[0], arguments[1], arguments[2]
        products = own_part(arguments[5], 4 * _WORK_FLOATS)
        for item in range(first_item(arguments[3] * tiles), end_item(arguments[3] * tiles)):
            slot, first = item // tiles, item % tiles * TILE
            units = min(TILE, hidden - first)
            weight = weights + (slot * hidden + first) * row_bytes
            end = load_integer(starts, slot + 1)
            for row in range(load_integer(starts, slot), end, TILE_ROWS):
                rows = min(TILE_ROWS, end - row)
                multiply(x + row * row_bytes, row_bytes, rows, weight, units, products)
                for number in range(rows):
                    out = arguments[4] + ((row + number) * hidden + first) * size
                    for d in range(units):
                        store(out, d, load(products, number * TILE + d, FLOAT32), format_)

    return Kernel(down, (hidden, width, format_))
