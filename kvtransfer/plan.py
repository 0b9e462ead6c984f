"""Which bytes go where. Pure arithmetic over the layer-major layout of ``protocol.kv``.

A chunk is a rectangle, some layers of some consecutive blocks of a grant, and its bytes have one
order on both sides: layer by layer, and within a layer in the grant's block order. So a checksum
over a chunk does not depend on where either side keeps its blocks. Nothing here touches memory.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from protocol.ids import BlockId
from protocol.kv import KVLayout


class Chunk(NamedTuple):
    """Layers ``first_layer ...`` of the grant's blocks ``first_block ...``."""

    first_layer: int
    num_layers: int
    first_block: int
    num_blocks: int


class Extent(NamedTuple):
    """``length`` bytes at ``offset`` of one rank's memory."""

    offset: int
    length: int


class Span(NamedTuple):
    """``length`` bytes, contiguous at both ends."""

    source: int
    destination: int
    length: int


def check_blocks(blocks: Sequence[BlockId], num_blocks: int, *, side: str) -> None:
    """
    Raises:
        ValueError: a block id is outside ``0 ... num_blocks - 1``.
    """
    if blocks and not (min(blocks) >= 0 and max(blocks) < num_blocks):
        outside = next(block for block in blocks if not 0 <= block < num_blocks)
        raise ValueError(f"{side} block {outside} is outside 0 ... {num_blocks - 1}")


def check_layers(layers: range, layout: KVLayout) -> None:
    """
    Raises:
        ValueError: the layers are not a rising range within the model.
    """
    if layers.step != 1 or layers.start < 0 or layers.stop > layout.num_layers:
        raise ValueError(f"layers {layers} are not within 0 ... {layout.num_layers - 1}")


def chunks(
    layout: KVLayout, *, layers: range, first_block: int, num_blocks: int, max_bytes: int
) -> Iterator[Chunk]:
    """Cut a rectangle into chunks of at most ``max_bytes``, or of one block of one layer.

    Whole layers are kept together where they fit, so that runs of blocks stay long.
    """
    if not layers or not num_blocks:
        return
    check_layers(layers, layout)
    blocks_per_chunk = min(num_blocks, max(1, max_bytes // layout.layer_block_bytes))
    layer_bytes = num_blocks * layout.layer_block_bytes
    layers_per_chunk = max(1, max_bytes // layer_bytes) if blocks_per_chunk == num_blocks else 1
    for layer in range(layers.start, layers.stop, layers_per_chunk):
        for block in range(0, num_blocks, blocks_per_chunk):
            yield Chunk(
                layer,
                min(layers_per_chunk, layers.stop - layer),
                first_block + block,
                min(blocks_per_chunk, num_blocks - block),
            )


def extents(
    layout: KVLayout,
    *,
    first_layer: int,
    num_layers: int,
    blocks: Sequence[BlockId],
    num_blocks: int,
) -> list[Extent]:
    """Where one side keeps the chunk of these blocks, in the chunk's order, neighbours merged.

    Raises:
        ValueError: a layer or block is out of range.
    """
    check_layers(range(first_layer, first_layer + num_layers), layout)
    check_blocks(blocks, num_blocks, side="a")
    unit = layout.layer_block_bytes
    runs: list[Extent] = []
    for block in blocks:
        if runs and runs[-1].offset + runs[-1].length == block * unit:
            runs[-1] = Extent(runs[-1].offset, runs[-1].length + unit)
        else:
            runs.append(Extent(block * unit, unit))
    layer_bytes = num_blocks * unit
    found: list[Extent] = []
    for layer in range(first_layer, first_layer + num_layers):
        base = layer * layer_bytes
        for offset, length in runs:
            if found and found[-1].offset + found[-1].length == base + offset:
                found[-1] = Extent(found[-1].offset, found[-1].length + length)
            else:
                found.append(Extent(base + offset, length))
    return found


def spans(source: Sequence[Extent], destination: Sequence[Extent]) -> list[Span]:
    """The copies that carry a chunk from one side's extents to the other's.

    Raises:
        ValueError: the two sides do not hold the same number of bytes.
    """
    if sum(extent.length for extent in source) != sum(extent.length for extent in destination):
        raise ValueError("the two sides of a chunk hold different numbers of bytes")
    found: list[Span] = []
    sources = iter(source)
    here, left = 0, 0
    for offset, length in destination:
        there, wanted = offset, length
        while wanted:
            if not left:
                here, left = next(sources)
            step = min(left, wanted)
            found.append(Span(here, there, step))
            here, there, left, wanted = here + step, there + step, left - step, wanted - step
    return found
