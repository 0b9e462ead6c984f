"""One rank's blocks in host memory, as what chunks are read from and written to.

A chunk's bytes in a row are in the order of ``kvtransfer.plan``, at both ends. Blocks and layers
that come here are in range.
"""

from collections.abc import Sequence

from kvtransfer.checksum import Checksum, chunk_crc
from kvtransfer.interface import KVMemory
from kvtransfer.memory import buffer
from kvtransfer.plan import Chunk, Geometry
from kvtransfer.shares import WHOLE, Share, places_of
from protocol.ids import BlockId


class HostPages:
    def __init__(self, memory: KVMemory, share: Share = WHOLE) -> None:
        """``share`` is what chunks carry of these blocks."""
        places = places_of(share, memory.layout)
        self.geometry = Geometry(
            memory.layout, memory.num_blocks, places, first_layer=memory.first_layer
        )
        self.view = buffer(memory)

    def num_bytes(self, chunk: Chunk) -> int:
        return chunk.num_layers * chunk.num_blocks * self.geometry.carried

    def places(self, chunk: Chunk, blocks: Sequence[BlockId]) -> list[memoryview]:
        """The chunk's bytes where they lie, in order."""
        extents = self.geometry.extents(chunk, blocks)
        return [self.view[offset : offset + length] for offset, length in extents]

    def gather(self, chunk: Chunk, blocks: Sequence[BlockId], row: memoryview) -> None:
        """Copy the chunk into the head of ``row``."""
        at = 0
        for place in self.places(chunk, blocks):
            row[at : at + len(place)] = place
            at += len(place)

    def scatter(self, chunk: Chunk, blocks: Sequence[BlockId], row: memoryview) -> None:
        """Copy the chunk that is in the head of ``row`` to its blocks."""
        at = 0
        for place in self.places(chunk, blocks):
            place[:] = row[at : at + len(place)]
            at += len(place)

    def crc(self, checksum: Checksum, chunk: Chunk, blocks: Sequence[BlockId]) -> int:
        return chunk_crc(checksum, self.view, self.geometry, chunk, blocks)
