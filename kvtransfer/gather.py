"""Scattered blocks to one row of bytes and back, on the device that holds them.

On a CPU by indexing; on a GPU by one Triton kernel for all layers and blocks, because a copy for
each would cost more to start than to run. A row is in the order of ``kvtransfer.plan``: layer by
layer, within a layer block by block. Where a row carries some heads only, these bytes of
each block move. Blocks and layers that come here are in range.
"""

# Shape suffixes: L layers of the pool   B blocks of the pool   M layers   N blocks   X bytes

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvtransfer.plan import Chunk, Extent
from protocol.ids import BlockId

_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


class Strip(NamedTuple):
    """``length`` bytes at an offset within one block of one layer, in the pages and in the row."""

    page: int
    row: int
    length: int


def gather(pages_LBX: Tensor, chunk: Chunk, blocks: Sequence[BlockId], row_X: Tensor) -> None:
    """Copy the chunk into the head of ``row_X``; on a GPU queued on the current stream."""
    unit = pages_LBX.shape[2]
    _move(pages_LBX, chunk, blocks, row_X, [Strip(0, 0, unit)], to_row=True, row_unit=unit)


def scatter(
    row_X: Tensor,
    pages_LBX: Tensor,
    chunk: Chunk,
    blocks: Sequence[BlockId],
    places: Sequence[Extent] = (),
) -> None:
    """Copy the chunk that is in the head of ``row_X`` to its blocks.

    Where the row carries only some parts of every block, ``places`` are these, in its order; the
    rest of the blocks stays as it is.
    """
    moved: list[Strip] = []
    at = 0
    for place, length in places or ((0, pages_LBX.shape[2]),):
        moved.append(Strip(place, at, length))
        at += length
    _move(pages_LBX, chunk, blocks, row_X, moved, to_row=False, row_unit=at)


def _move(
    pages_LBX: Tensor,
    chunk: Chunk,
    blocks: Sequence[BlockId],
    row_X: Tensor,
    strips: Sequence[Strip],
    *,
    to_row: bool,
    row_unit: int,
) -> None:
    index_N = torch.tensor(blocks, dtype=torch.int64, device=pages_LBX.device)
    layers = slice(chunk.first_layer, chunk.first_layer + chunk.num_layers)
    count = chunk.num_layers * chunk.num_blocks
    row_MNX = row_X[: count * row_unit].view(chunk.num_layers, chunk.num_blocks, row_unit)
    for strip in strips:
        here = pages_LBX[layers, :, strip.page : strip.page + strip.length]
        there = row_MNX[:, :, strip.row : strip.row + strip.length]
        if pages_LBX.device.type != "cpu":
            kernels().copy_blocks(here, index_N, there, to_row=to_row)
        elif to_row:
            there.copy_(here.index_select(1, index_N))
        else:
            here.index_copy_(1, index_N, there)


def kernels() -> Any:
    """The Triton kernels, which are imported on machines with a GPU only."""
    return importlib.import_module("kvtransfer.gather_kernels")


def words(*tensors: Tensor) -> list[Tensor]:
    """The same bytes as the widest words that strides, sizes and addresses allow."""
    for word in _WORDS:
        size = word.itemsize
        if all(
            tensor.data_ptr() % size == 0
            and tensor.shape[-1] % size == 0
            and all(stride % size == 0 for stride in tensor.stride()[:-1])
            for tensor in tensors
        ):
            return [tensor.view(word) for tensor in tensors]
    raise AssertionError("bytes are words")
