"""CRC-32 of bytes that lie in several places. ISA-L's, because it reads faster than memory does."""

from collections.abc import Iterable
from typing import Literal

from isal.isal_zlib import crc32

from kvtransfer.plan import Extent

Checksum = Literal["full", "off"]
"""``full``: both ends read every byte once more. ``off``: what arrived is taken as it is."""

PIECE_BYTES = 128 * 1024  # copied and then read again, a piece is still in the core's own cache


def crc32_of(view: memoryview, extents: Iterable[Extent], value: int = 0) -> int:
    """The CRC-32 of the extents' bytes, end to end, continuing from ``value``."""
    for offset, length in extents:
        value = crc32(view[offset : offset + length], value)
    return value
