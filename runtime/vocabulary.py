"""What each token id stands for, in bytes: the part of a tokenizer that every role can need.

Invariant: gateway and workers spell a token alike, because both do it here. How text is cut into
tokens is not known here.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from protocol.errors import ConfigError

PieceStyle = Literal["byte_level", "byte_fallback"]

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class Vocabulary(msgspec.Struct, frozen=True, kw_only=True):
    """``tokens[i]`` are the bytes of token ``i``, empty where the vocabulary has a hole. Special
    tokens are never text.
    """

    tokens: tuple[bytes, ...]
    special_ids: tuple[int, ...]


def piece_style(decoder: Mapping[str, Any] | None) -> PieceStyle:
    """How the ``decoder`` of a ``tokenizer.json`` turns tokens into text.

    Raises:
        ConfigError: in a way that cannot be done token by token.
    """
    kinds = [stage["type"] for stage in decoder_stages(decoder)]
    if kinds == ["ByteLevel"]:
        return "byte_level"
    if kinds in (["Replace", "ByteFallback", "Fuse"], ["Replace", "ByteFallback", "Fuse", "Strip"]):
        return "byte_fallback"
    raise ConfigError(
        f"tokenizer.json: decoder {' + '.join(map(str, kinds)) or 'null'} is not supported; "
        "supported are ByteLevel and Replace + ByteFallback + Fuse (+ Strip)"
    )


def decoder_stages(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    nested = decoder.get("decoders")
    return nested if isinstance(nested, list) else [decoder]


def is_byte_piece(token: str) -> bool:
    """Whether a ``byte_fallback`` vocabulary means a single byte by ``token``."""
    return _BYTE_PIECE.match(token) is not None


def token_bytes(token: str, style: PieceStyle) -> bytes:
    """The bytes that the vocabulary's spelling ``token`` stands for; perhaps not whole UTF-8."""
    if style == "byte_level":
        try:
            return bytes(map(_BYTE_OF_CHAR.__getitem__, token))
        except KeyError:
            return token.encode()  # an added token, written as it is
    byte = _BYTE_PIECE.match(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()


def _byte_of_char() -> dict[str, int]:
    """The printable stand-ins of byte-level vocabularies: bytes without a visible form are moved
    to code points from 256 on, in order. Source: GPT-2 (Radford et al., 2019), section 2.2.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(0x100) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): b for i, b in enumerate(moved)}


_BYTE_OF_CHAR = _byte_of_char()
