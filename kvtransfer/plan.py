"""Which bytes go where. Pure arithmetic over the layer-major layout of ``protocol.kv``.

A chunk is a rectangle, some layers of some consecutive blocks of a grant, and its bytes have one
order on both sides: layer by layer, and within a layer in the grant's block order. So a checksum
over a chunk does not depend on where either side keeps its blocks. Nothing here touches memory.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from protocol.ids import BlockId
from protocol.kv import KVLayout

SAMPLE_BYTES = 4096
Extent = tuple[int, int]  # (offset, length): bytes of one rank's memory


class Chunk(NamedTuple):
    """Layers ``first_layer ...`` of the grant's blocks ``first_block ...``."""

    first_layer: int
    num_layers: int
    first_block: int
    num_blocks: int


class Run(NamedTuple):
    """``length`` blocks that follow each other in memory at both ends."""

    source: int
    target: int
    length: int


def chunks(
    layout: KVLayout, *, layers: range, first_block: int, num_blocks: int, max_bytes: int
) -> Iterator[Chunk]:
    """Cut a rectangle into chunks of at most ``max_bytes``, or of one block of one layer.

    Whole layers are kept together where they fit, so that runs of blocks stay long.
    """
    if not layers or not num_blocks:
        return
    unit = layout.layer_block_bytes
    blocks_per_chunk = min(num_blocks, max(1, max_bytes // unit))
    layers_per_chunk = max(1, max_bytes // (num_blocks * unit))
    for layer in range(layers.start, layers.stop, layers_per_chunk):
        for block in range(0, num_blocks, blocks_per_chunk):
            yield Chunk(
                layer,
                min(layers_per_chunk, layers.stop - layer),
                first_block + block,
                min(blocks_per_chunk, num_blocks - block),
            )


def joined(
    chunk: Chunk,
    blocks: tuple[BlockId, ...],
    other: Chunk,
    other_blocks: tuple[BlockId, ...],
) -> tuple[Chunk, tuple[BlockId, ...]] | None:
    """The rectangle that two neighbours form, the same layers or the same blocks of them; or None.

    ``blocks`` are those at the source.
    """
    layer, layers, block, count = chunk
    if (layer, layers, block + count) == other[:3]:
        return Chunk(layer, layers, block, count + other.num_blocks), blocks + other_blocks
    if (layer + layers, block, count) == (other[0], *other[2:]) and blocks == other_blocks:
        return Chunk(layer, layers + other.num_layers, block, count), blocks
    return None


def runs(source_blocks: Sequence[BlockId], target_blocks: Sequence[BlockId]) -> list[Run]:
    """Pair blocks in order, neighbours merged where both sides are contiguous.

    Raises:
        ValueError: the two sides do not name the same number of blocks.
    """
    if len(source_blocks) != len(target_blocks):
        raise ValueError(f"{len(source_blocks)} source blocks for {len(target_blocks)} blocks")
    if _is_contiguous(source_blocks) and _is_contiguous(target_blocks):
        return [Run(source_blocks[0], target_blocks[0], len(source_blocks))]
    found: list[Run] = []
    first_source = first_target = length = 0
    for source, target in zip(source_blocks, target_blocks, strict=True):
        if length and source == first_source + length and target == first_target + length:
            length += 1
            continue
        if length:
            found.append(Run(first_source, first_target, length))
        first_source, first_target, length = source, target, 1
    if length:
        found.append(Run(first_source, first_target, length))
    return found


def check_blocks(blocks: Sequence[BlockId], num_blocks: int, *, side: str) -> None:
    """
    Raises:
        ValueError: a block id is outside ``0 ... num_blocks - 1``.
    """
    if blocks and not (min(blocks) >= 0 and max(blocks) < num_blocks):
        outside = next(block for block in blocks if not 0 <= block < num_blocks)
        raise ValueError(f"{side} block {outside} is outside 0 ... {num_blocks - 1}")


def check_layers(layers: range, held: range) -> None:
    """
    Raises:
        ValueError: the layers are not a rising range within those that are held.
    """
    if layers.step != 1 or layers.start < held.start or layers.stop > held.stop:
        raise ValueError(f"layers {layers} are not within {held.start} ... {held.stop - 1}")


def slices(places: Sequence[memoryview], max_bytes: int) -> Iterator[list[memoryview]]:
    """The places' bytes in order, in parts of ``max_bytes``; only the last one may be shorter."""
    part: list[memoryview] = []
    room = max_bytes
    for place in places:
        start = 0
        while start < len(place):
            piece = place[start : start + room]
            part.append(piece)
            start += len(piece)
            room -= len(piece)
            if not room:
                yield part
                part, room = [], max_bytes
    if part:
        yield part


class Geometry:
    """Where one rank keeps its blocks. Layers and blocks that come here are in range already.

    ``places`` are the parts of each block of each layer that chunks carry, in their order: all of
    it, unless the other end has only some of the heads. ``first_layer`` is the model's layer that
    is the first one here.
    """

    __slots__ = (
        "first_layer",
        "layer_bytes",
        "num_blocks",
        "num_layers",
        "places",
        "sample_bytes",
        "unit",
    )

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        places: Sequence[Extent] | None = None,
        *,
        first_layer: int = 0,
    ) -> None:
        self.unit = layout.layer_block_bytes  # bytes of one block of one layer
        self.places: Sequence[Extent] = places or ((0, self.unit),)
        self.num_layers = layout.num_layers
        self.first_layer = first_layer
        self.num_blocks = num_blocks
        self.layer_bytes = num_blocks * self.unit
        self.sample_bytes = min(self.places[0][1], layout.head_block_bytes, SAMPLE_BYTES)

    @property
    def is_whole(self) -> bool:
        return self.places[0][1] == self.unit

    @property
    def carried(self) -> int:
        """Bytes of one block of one layer that chunks carry."""
        return sum(length for _, length in self.places)

    def extents(self, chunk: Chunk, blocks: Sequence[BlockId]) -> list[Extent]:
        """The bytes of the chunk that is in these blocks, in its order, neighbours merged."""
        if not self.is_whole:
            return [
                (start + block * self.unit + at, length)
                for start in self._layers(chunk)
                for block in blocks
                for at, length in self.places
            ]
        if _is_contiguous(blocks):
            at, size = blocks[0] * self.unit, len(blocks) * self.unit
            if size == self.layer_bytes:
                return [(self._layers(chunk).start, chunk.num_layers * size)]
            return [(start + at, size) for start in self._layers(chunk)]
        pieces = [(run.source * self.unit, run.length * self.unit) for run in runs(blocks, blocks)]
        return [(start + at, size) for start in self._layers(chunk) for at, size in pieces]

    def sample(self, chunk: Chunk, blocks: Sequence[BlockId]) -> list[Extent]:
        """The head of one block of each layer of the chunk, of another from layer to layer."""
        unit, count, layer = self.unit, len(blocks), chunk.first_layer
        first, size = self.places[0][0], self.sample_bytes
        return [
            (start + blocks[(layer + i) % count] * unit + first, size)
            for i, start in enumerate(self._layers(chunk))
        ]

    def _layers(self, chunk: Chunk) -> range:
        first = (chunk.first_layer - self.first_layer) * self.layer_bytes
        return range(first, first + chunk.num_layers * self.layer_bytes, self.layer_bytes)


def _is_contiguous(blocks: Sequence[BlockId]) -> bool:
    count = len(blocks)
    if not count or blocks[-1] - blocks[0] != count - 1:
        return False
    return list(blocks) == list(range(blocks[0], blocks[0] + count))
