"""What the two ends of a carrier tell each other once, between the handshake and the first frame:
addresses of memory, ids of communicators. One authenticated frame in each direction at most.
"""

import socket
import time

from kvtransfer.frames import HEADER_BYTES, NO_GRANT, Kind, Seal, check_tag, control, decode
from protocol.errors import ProtocolError

MAX_TERMS_BYTES = 64 * 1024
_TERMS = frozenset({Kind.TERMS})


def tell(sock: socket.socket, seal: Seal, payload: bytes, timeout_s: float) -> None:
    """
    Raises:
        OSError: the connection broke, or the peer reads nothing.
    """
    sock.settimeout(timeout_s)
    sock.sendall(control(Kind.TERMS, NO_GRANT, seal, payload))
    sock.settimeout(None)


def hear(sock: socket.socket, seal: Seal, timeout_s: float) -> bytes:
    """
    Raises:
        ProtocolError: not the peer's terms.
        OSError: the connection broke, or the peer says nothing.
    """
    deadline = time.monotonic() + timeout_s
    header = _exactly(sock, HEADER_BYTES, deadline)
    frame = decode(header, _TERMS)
    if frame.length > MAX_TERMS_BYTES:
        raise ProtocolError("terms too long", bytes=frame.length, limit=MAX_TERMS_BYTES)
    payload = _exactly(sock, frame.length, deadline)
    check_tag(header, payload, seal)
    sock.settimeout(None)
    return payload


def _exactly(sock: socket.socket, size: int, deadline: float) -> bytes:
    received = bytearray()
    while len(received) < size:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        data = sock.recv(size - len(received))
        if not data:
            raise ConnectionResetError("the KV peer has ended the connection")
        received += data
    return bytes(received)
