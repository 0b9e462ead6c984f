"""Frames of a KV connection after its handshake: a fixed header, then ``length`` bytes or none.

    prefill -> decode   OPEN, CHUNK, FINISH, ABORT, DRAINED, STOPPED, PROBE
    decode -> prefill   OPENED, REFUSED, COMMITTED, CANCEL, PROBED
    behind a CHUNK      CHECK, on tcp with a full checksum
    before all others   TERMS, at most one each way, where a transport needs it

With a cluster key every header, its place in the sequence and every control payload are
authenticated; the payload of a CHUNK is covered by its CRC only.
"""

import hashlib
import hmac
import struct
from enum import IntEnum
from typing import NamedTuple

from kvtransfer.limits import MAX_CONTROL_BYTES
from kvtransfer.plan import Chunk
from protocol.errors import ProtocolError
from protocol.ids import Generation

MAGIC = b"HRKV"
VERSION = 4
_FIELDS = struct.Struct("<4sBBxxQHHIIII")  # magic ... crc
_SEQUENCE = struct.Struct("<Q")
_TAG_BYTES = 16
HEADER_BYTES = _FIELDS.size + _TAG_BYTES
_NO_TAG = bytes(_TAG_BYTES)
NO_CHUNK = Chunk(0, 0, 0, 0)
NO_GRANT = Generation(0)  # of frames that are about the connection


class Kind(IntEnum):
    OPEN = 1  # payload: the grant's attempt; nothing may be written before OPENED
    CHUNK = 2
    FINISH = 3  # payload: the role's; all chunks went before it
    ABORT = 4  # payload: an error report; the source has stopped writing
    DRAINED = 5  # answer to CANCEL: nothing is being written for the grant, or ever will be
    CHECK = 8  # the CRC of the CHUNK before it, where the sender learns it while it sends
    STOPPED = 6  # nothing is being written over this connection, or ever will be; its last frame
    OPENED = 16
    REFUSED = 17  # payload: an error report
    COMMITTED = 18
    CANCEL = 19  # payload: an error report; the source must stop and answer DRAINED
    PROBE = 7  # bytes to be thrown away, as many as a chunk's may be; answered by PROBED
    PROBED = 20
    TERMS = 32  # payload: what one end of a transport must know of the other


_WITH_BYTES = frozenset({Kind.CHUNK, Kind.PROBE})
FROM_SOURCE = frozenset(
    {Kind.OPEN, Kind.CHUNK, Kind.FINISH, Kind.ABORT, Kind.DRAINED, Kind.STOPPED, Kind.PROBE}
)
FROM_SINK = frozenset({Kind.OPENED, Kind.REFUSED, Kind.COMMITTED, Kind.CANCEL, Kind.PROBED})


class Frame(NamedTuple):
    kind: Kind
    generation: Generation
    chunk: Chunk = NO_CHUNK
    length: int = 0  # bytes of KV for a CHUNK or PROBE, of payload for the others
    crc: int = 0


class Seal:
    """Authenticates one direction of one connection. Without a key, tags are zero."""

    def __init__(self, key: bytes | None) -> None:
        self._key = key
        self._sequence = 0

    def tag(self, fields: bytes | memoryview, payload: bytes | bytearray) -> bytes:
        """The next frame's tag; every call advances the sequence."""
        self._sequence += 1
        if self._key is None:
            return _NO_TAG
        message = b"".join((_SEQUENCE.pack(self._sequence), fields, payload))
        return hashlib.blake2b(message, key=self._key, digest_size=_TAG_BYTES).digest()


def encode(frame: Frame, seal: Seal, payload: bytes = b"") -> bytes:
    """A header with ``payload`` behind it; a CHUNK's bytes are sent by its transport."""
    fields = _FIELDS.pack(
        MAGIC, VERSION, frame.kind, frame.generation, *frame.chunk, frame.length, frame.crc
    )
    return b"".join((fields, seal.tag(fields, payload), payload))


def control(kind: Kind, generation: Generation, seal: Seal, payload: bytes = b"") -> bytes:
    return encode(Frame(kind, generation, length=len(payload)), seal, payload)


def decode(header: bytes | bytearray, allowed: frozenset[Kind]) -> Frame:
    """
    Raises:
        ProtocolError: not a header, not of this version, not a kind that the peer may send, or a
            control payload over the limit.
    """
    magic, version, kind, generation, *chunk, length, crc = _FIELDS.unpack_from(header)
    if magic != MAGIC or version != VERSION:
        raise ProtocolError("not a KV frame of this version", version=version)
    if kind not in allowed:
        raise ProtocolError("a kind of KV frame that this peer may not send", kind=kind)
    if kind not in _WITH_BYTES and length > MAX_CONTROL_BYTES:
        raise ProtocolError("control payload too large", bytes=length, limit=MAX_CONTROL_BYTES)
    return Frame(Kind(kind), generation, Chunk(*chunk), length, crc)


def check_tag(header: bytes | bytearray, payload: bytes | bytearray, seal: Seal) -> None:
    """
    Raises:
        ProtocolError: the frame was not made by the holder of the connection's key, in this place.
    """
    fields = memoryview(header)[: _FIELDS.size]
    expected = seal.tag(fields, payload)
    if not hmac.compare_digest(bytes(header[_FIELDS.size : HEADER_BYTES]), expected):
        raise ProtocolError("a KV frame with a wrong authentication tag")
