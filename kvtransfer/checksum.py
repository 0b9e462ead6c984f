"""CRC-32 of bytes that lie in several places. ISA-L's, because it reads as fast as memory does."""

from collections.abc import Iterable, Sequence
from typing import Literal

from isal.isal_zlib import crc32

from kvtransfer.plan import Chunk, Extent, Geometry
from protocol.ids import BlockId

Checksum = Literal["full", "sampled", "off"]
"""``full``: both ends read every byte once more. ``sampled``: 4 KB of each layer of each chunk,
which finds bytes in the wrong place but not a flipped bit. ``off``: nothing is read."""
ChecksumChoice = Literal["auto", "full", "sampled", "off"]
"""``auto``: full where bytes leave the machine, sampled where it copies its own memory."""


def crc32_of(view: memoryview, extents: Iterable[Extent], value: int = 0) -> int:
    """The CRC-32 of the extents' bytes, end to end, continuing from ``value``."""
    for offset, length in extents:
        value = crc32(view[offset : offset + length], value)
    return value


def chunk_crc(
    checksum: Checksum,
    view: memoryview,
    geometry: Geometry,
    chunk: Chunk,
    blocks: Sequence[BlockId],
) -> int:
    """The check of a chunk whose bytes are in these blocks of ``view``; the same at both ends."""
    if checksum == "full":
        return crc32_of(view, geometry.extents(chunk, blocks))
    if checksum == "sampled":
        return crc32_of(view, geometry.sample(chunk, blocks))
    return 0
