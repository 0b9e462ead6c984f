"""What ranks say to one another while they meet, and how it is sealed.

A visit is one TCP connection. The host sends a nonce and a mark of its group, for ports are used
again, by ranks of other groups too; the visitor sends its ``Ticket``; and then the host sends
``Wait`` until it has a ``Roll``, a ``Follow`` or a ``Refusal`` to give. Each ``Wait`` is answered
with the ticket again. Every frame has a length, an HMAC-SHA256 over the nonce, the direction, the
frame's number and the body, and the body in msgpack. Who holds the cluster's key can make that
HMAC; without a key it only finds damage, and everything stays on loopback.
"""

import hashlib
import hmac
import secrets
import socket
import time
from typing import Any, Final

import msgspec

from protocol.errors import WorkerLost

MAX_FRAME_BYTES: Final = 256 * 1024
_NONCE_BYTES: Final = 16
_MARK_BYTES: Final = 8
_SEAL_BYTES: Final = 32
_LENGTH_BYTES: Final = 4


class Ticket(msgspec.Struct, frozen=True, array_like=True, tag="ticket"):
    """A rank that wants to take part. ``number`` is random, of one attempt of one process."""

    rank: int
    number: int
    address: str  # where this rank receives visitors, host:port
    last_epoch: int  # of the group that it was in before; 0: in none
    last_members: tuple[int, ...]
    terms: dict[str, str]  # what must be equal on all ranks of a group
    failure: str = ""  # why it comes only to say that it cannot take part


class Wait(msgspec.Struct, frozen=True, array_like=True, tag="wait"):
    """The visitor is at the right place, and not all are there yet."""


class Follow(msgspec.Struct, frozen=True, array_like=True, tag="follow"):
    """The host itself waits at a lower rank's."""

    rank: int
    address: str


class Refusal(msgspec.Struct, frozen=True, array_like=True, tag="refusal"):
    """The visitor cannot be in a group with the host."""

    reason: str


class Roll(msgspec.Struct, frozen=True, array_like=True, tag="roll"):
    """Who is in the group of ``epoch``. The sequences are in ascending order of the ranks."""

    epoch: int
    number: int  # random: connections of another attempt cannot be taken for this one's
    members: tuple[int, ...]
    tickets: tuple[int, ...]
    addresses: tuple[str, ...]
    store: str  # where members find one another's connections, host:port


Answer = Wait | Follow | Refusal | Roll


class Sealed:
    """One end of a visit. Every method raises ``WorkerLost`` when the other end does not follow
    the protocol, does not hold the key, has gone, or is silent for longer than the socket waits.
    """

    def __init__(self, connection: socket.socket, *, group: str, key: bytes, host: bool) -> None:
        self._connection = connection
        self._mark = hashlib.sha256(group.encode()).digest()[:_MARK_BYTES]
        self._key = key
        self._sends, self._hears = (b"host", b"visitor") if host else (b"visitor", b"host")
        self._sent = self._heard = 0
        self._nonce = b""

    def greet(self) -> None:
        """The host's first word."""
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._write(self._nonce + self._mark)

    def be_greeted(self) -> None:
        self._nonce = self._read(_NONCE_BYTES)
        if self._read(_MARK_BYTES) != self._mark:
            raise WorkerLost("a rank of another group answers there")

    def send(self, message: Ticket | Answer) -> None:
        body = msgspec.msgpack.encode(message)
        seal = self._seal(self._sends, self._sent, body)
        self._write(len(body).to_bytes(_LENGTH_BYTES, "little") + seal + body)
        self._sent += 1

    def ticket(self) -> Ticket:
        ticket: Ticket = self._receive(Ticket)
        return ticket

    def answer(self) -> Answer:
        answer: Answer = self._receive(Answer)
        return answer

    def _receive(self, kind: Any) -> Any:
        length = int.from_bytes(self._read(_LENGTH_BYTES), "little")
        if length > MAX_FRAME_BYTES:
            raise WorkerLost(f"a frame of {length} bytes came; at most {MAX_FRAME_BYTES} can")
        seal, body = self._read(_SEAL_BYTES), self._read(length)
        if not hmac.compare_digest(seal, self._seal(self._hears, self._heard, body)):
            raise WorkerLost("a frame is damaged, or its sender has another cluster key")
        self._heard += 1
        try:
            return msgspec.msgpack.decode(body, type=kind)
        except msgspec.DecodeError as error:
            raise WorkerLost(f"a frame cannot be read: {error}; is it another release?") from error

    def _seal(self, direction: bytes, number: int, body: bytes) -> bytes:
        parts = (self._nonce, direction, number.to_bytes(8, "little"), body)
        return hmac.digest(self._key, b"\0".join(parts), hashlib.sha256)

    def _write(self, data: bytes) -> None:
        try:
            self._connection.sendall(data)
        except OSError as error:
            raise WorkerLost(f"the connection has ended: {error}") from error

    def _read(self, size: int) -> bytes:
        # In all, not for each part: who sends a byte at a time is silent too.
        timeout_s = self._connection.gettimeout()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        data = bytearray()
        while len(data) < size:
            if deadline is not None and time.monotonic() > deadline:
                raise WorkerLost("a frame did not come in time")
            try:
                part = self._connection.recv(size - len(data))
            except OSError as error:
                raise WorkerLost(f"nothing came: {error}") from error
            if not part:
                raise WorkerLost("the connection has ended")
            data += part
        return bytes(data)
