import pytest

from kvtransfer.frames import (
    FROM_SINK,
    FROM_SOURCE,
    HEADER_BYTES,
    Frame,
    Kind,
    Seal,
    check_tag,
    control,
    decode,
    encode,
)
from kvtransfer.limits import MAX_CONTROL_BYTES
from kvtransfer.plan import Chunk
from protocol.errors import ProtocolError
from protocol.ids import Generation

KEY = b"k" * 32
CHUNK = Frame(Kind.CHUNK, Generation(2**63), Chunk(60, 61, 2**31, 2**20), 2**31, 2**32 - 1)


def test_a_frame_survives_the_wire() -> None:
    data = encode(CHUNK, Seal(None))
    assert len(data) == HEADER_BYTES
    assert decode(data, FROM_SOURCE) == CHUNK


@pytest.mark.parametrize(
    "damage",
    [(0, b"X"), (4, b"\x09"), (5, b"\x63")],
    ids=["magic", "version", "kind"],
)
def test_a_damaged_header_is_refused(damage: tuple[int, bytes]) -> None:
    data = bytearray(encode(CHUNK, Seal(None)))
    data[damage[0] : damage[0] + 1] = damage[1]
    with pytest.raises(ProtocolError):
        decode(data, FROM_SOURCE)


def test_a_peer_may_not_speak_the_other_sides_lines() -> None:
    with pytest.raises(ProtocolError, match="may not send"):
        decode(control(Kind.COMMITTED, Generation(1), Seal(None)), FROM_SOURCE)
    with pytest.raises(ProtocolError, match="may not send"):
        decode(control(Kind.FINISH, Generation(1), Seal(None)), FROM_SINK)


def test_a_control_payload_has_a_limit() -> None:
    data = encode(Frame(Kind.FINISH, Generation(1), length=MAX_CONTROL_BYTES + 1), Seal(None))
    with pytest.raises(ProtocolError, match="too large"):
        decode(data, FROM_SOURCE)


def test_sealed_frames_are_accepted_in_their_order() -> None:
    sender, receiver = Seal(KEY), Seal(KEY)
    for payload in (b"first", b"", b"third"):
        data = control(Kind.FINISH, Generation(7), sender, payload)
        check_tag(data[:HEADER_BYTES], data[HEADER_BYTES:], receiver)


@pytest.mark.parametrize("attack", ["replay", "skip", "payload", "header", "other key"])
def test_a_forged_or_replayed_frame_is_refused(attack: str) -> None:
    sender, receiver = Seal(KEY if attack != "other key" else b"x" * 32), Seal(KEY)
    first = bytearray(control(Kind.FINISH, Generation(7), sender, b"payload"))
    if attack == "replay":
        check_tag(first[:HEADER_BYTES], first[HEADER_BYTES:], receiver)
    elif attack == "skip":
        first = bytearray(control(Kind.FINISH, Generation(7), sender, b"payload"))
    elif attack == "payload":
        first[-1] ^= 1
    elif attack == "header":
        first[8] ^= 1
    with pytest.raises(ProtocolError, match="authentication tag"):
        check_tag(first[:HEADER_BYTES], first[HEADER_BYTES:], receiver)
