"""Tokens of which nothing but their ids is to be told, as they travel: 16 bytes each.

Nearly all tokens are of this kind, and a step has one for each of hundreds of streams. So they are
no structs but records in one run of bytes, which either side handles without an object a token:
the stream's number (8 bytes), the token's index among its request's output tokens (4), its id (4),
all little-endian.

A stream's number is what its gateway calls an attempt (``GenerateRequest.stream``).
"""

from struct import Struct
from typing import NamedTuple

_RECORD = Struct("<QII")
RECORD_BYTES = _RECORD.size

pack_token = _RECORD.pack
"""``(stream, offset, token_id)`` to a record."""


class PlainToken(NamedTuple):
    stream: int
    offset: int
    token_id: int


def plain_token(records: bytes | bytearray, place: int) -> PlainToken:
    return PlainToken._make(_RECORD.unpack_from(records, place * RECORD_BYTES))
