"""Bytes on the bus: MessagePack, decoded straight into typed structs. Nothing else is accepted.

A frame is one message. ``WIRE_VERSION`` is part of every worker's fingerprint, so peers of
different versions never meet past registration.
"""

from typing import Any, Generic, TypeVar

import msgspec

from protocol.errors import ProtocolError

WIRE_VERSION = 1
MAX_FRAME_BYTES = 64 * 1024 * 1024

M = TypeVar("M")
_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    return _encoder.encode(message)


class Decoder(Generic[M]):
    """Decodes one family of messages, for instance ``Decoder(ToDecode)``.

    Raises:
        ProtocolError: the bytes are not a message of the family; nothing was half-read.
    """

    def __init__(self, family: Any) -> None:  # a union is no type to the checker
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(family)

    def decode(self, frame: bytes) -> M:
        if len(frame) > MAX_FRAME_BYTES:
            raise ProtocolError("frame too large", bytes=len(frame), limit=MAX_FRAME_BYTES)
        try:
            return self._decoder.decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"not a message: {error}") from error
