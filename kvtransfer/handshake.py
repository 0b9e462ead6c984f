"""How the two ends of a KV connection come to trust each other, before any frame.

    prefill -> decode   Hello(nonce, who I am, whom I look for)
    decode -> prefill   Challenge(nonce, proof)
    prefill -> decode   Answer(proof)
    decode -> prefill   Accepted(number of blocks, checksum) or Declined(code, message)

A proof is an HMAC-SHA256 of both nonces and the Hello by the cluster key, so neither end says
anything to a stranger, and the frames' keys follow from the same nonces. Without a cluster key
the proofs are empty, and only the same machine is let in: loopback for tcp, the same user for a
Unix socket. Everything is bounded: each message's size, and the whole by one deadline.
"""

import hashlib
import hmac
import ipaddress
import os
import secrets
import socket
import struct
import time
from dataclasses import dataclass
from typing import Literal

import msgspec

from kvtransfer.checksum import Checksum
from kvtransfer.frames import MAGIC, VERSION, Seal
from kvtransfer.shares import WHOLE, Share, layout_of
from protocol.errors import BY_CODE, LayoutMismatch, ProtocolError, TransferError
from protocol.ids import WorkerRef
from protocol.kv import KVLayout

MAX_MESSAGE_BYTES = 4096
_PREFIX = struct.Struct("<4sI")
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


Payload = Literal["exact", "fp8"]
"""What travels over TCP: the blocks' bytes, or 8-bit floats with scales (``kvtransfer.fp8``)."""


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    version: int
    nonce: bytes
    source: WorkerRef
    decode: WorkerRef
    layout_digest: str  # of all heads and layers
    share: Share = WHOLE  # what this connection brings of them


class Challenge(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    nonce: bytes
    proof: bytes


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    proof: bytes


class Accepted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    num_blocks: int
    checksum: Checksum
    payload: Payload


class Declined(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A peer that has proven itself, and the seals of the frames to come."""

    source: WorkerRef
    share: Share
    incoming: Seal
    outgoing: Seal


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """The decode rank that has let us in."""

    num_blocks: int
    checksum: Checksum
    payload: Payload
    incoming: Seal
    outgoing: Seal


_encode = msgspec.msgpack.Encoder().encode
_hello = msgspec.msgpack.Decoder(Hello)
_challenge = msgspec.msgpack.Decoder(Challenge)
_answer = msgspec.msgpack.Decoder(Answer)
_verdict = msgspec.msgpack.Decoder(Accepted | Declined)


def connect(
    sock: socket.socket,
    *,
    source: WorkerRef,
    decode: WorkerRef,
    layout_digest: str,
    share: Share = WHOLE,
    cluster_key: bytes | None,
    timeout_s: float,
) -> Connected:
    """The prefill side of the handshake.

    Raises:
        LayoutMismatch: the decode rank's layout is another.
        TransferError: it did not prove itself, declined, or took too long.
    """
    deadline = time.monotonic() + timeout_s
    check_user(sock)
    hello = Hello(
        version=VERSION,
        nonce=secrets.token_bytes(16),
        source=source,
        decode=decode,
        layout_digest=layout_digest,
        share=share,
    )
    greeting = _encode(hello)
    try:
        _send(sock, greeting, deadline)
        challenge = _challenge.decode(_receive(sock, deadline))
        transcript = greeting + challenge.nonce
        if not hmac.compare_digest(challenge.proof, _proof(cluster_key, b"decode", transcript)):
            raise TransferError("the decode rank does not hold this cluster's key")
        _send(sock, _encode(Answer(proof=_proof(cluster_key, b"prefill", transcript))), deadline)
        verdict = _verdict.decode(_receive(sock, deadline))
    except (OSError, msgspec.DecodeError, ProtocolError) as error:
        raise TransferError(f"no KV handshake with {decode.worker_id}: {error}") from error
    if isinstance(verdict, Declined):
        kind = BY_CODE.get(verdict.code, TransferError)
        raise (kind if issubclass(kind, TransferError) else TransferError)(verdict.message)
    return Connected(
        num_blocks=verdict.num_blocks,
        checksum=verdict.checksum,
        payload=verdict.payload,
        incoming=_seal(cluster_key, b"from decode", transcript),
        outgoing=_seal(cluster_key, b"from prefill", transcript),
    )


def admit(
    sock: socket.socket,
    *,
    decode: WorkerRef,
    layout: KVLayout,
    num_blocks: int,
    checksum: Checksum,
    payload: Payload = "exact",
    cluster_key: bytes | None,
    timeout_s: float,
) -> Admitted:
    """The decode side of the handshake; the peer has been told whatever the outcome is.

    Raises:
        ProtocolError: a stranger, or not this protocol.
        TransferError: a member of the cluster that looks for another worker, life or layout.
        OSError: the connection broke or was too slow.
    """
    deadline = time.monotonic() + timeout_s
    if cluster_key is None:
        check_local(sock)
    check_user(sock)
    greeting = _receive(sock, deadline)
    nonce = secrets.token_bytes(16)
    transcript = greeting + nonce
    try:
        hello = _hello.decode(greeting)
        challenge = Challenge(nonce=nonce, proof=_proof(cluster_key, b"decode", transcript))
        _send(sock, _encode(challenge), deadline)
        answer = _answer.decode(_receive(sock, deadline))
    except msgspec.DecodeError as error:
        raise ProtocolError(f"not a KV handshake: {error}") from error
    if not hmac.compare_digest(answer.proof, _proof(cluster_key, b"prefill", transcript)):
        raise ProtocolError("the prefill worker does not hold this cluster's key")
    problem = _mismatch(hello, decode, layout)
    if problem is not None:
        _send(sock, _encode(Declined(code=problem.code, message=str(problem))), deadline)
        raise problem
    accepted = Accepted(num_blocks=num_blocks, checksum=checksum, payload=payload)
    _send(sock, _encode(accepted), deadline)
    return Admitted(
        source=hello.source,
        share=hello.share,
        incoming=_seal(cluster_key, b"from prefill", transcript),
        outgoing=_seal(cluster_key, b"from decode", transcript),
    )


def check_local(sock: socket.socket) -> None:
    """
    Raises:
        ProtocolError: the peer is on another machine.
    """
    if sock.family == socket.AF_UNIX:
        return
    host = sock.getpeername()[0]
    if not ipaddress.ip_address(host).is_loopback:
        raise ProtocolError("a remote KV peer, and no cluster key is configured")


def is_one_machine(sock: socket.socket) -> bool:
    """Whether what this socket carries never leaves the machine."""
    if sock.family == socket.AF_UNIX:
        return True
    host: str = sock.getpeername()[0]
    return host == sock.getsockname()[0] or ipaddress.ip_address(host).is_loopback


def check_user(sock: socket.socket) -> None:
    """
    Raises:
        ProtocolError: the process at the other end of this Unix socket is another user's.
    """
    if sock.family != socket.AF_UNIX:
        return
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    if _CREDENTIALS.unpack(raw)[1] != os.geteuid():
        raise ProtocolError("a KV peer of another user")


def _mismatch(hello: Hello, decode: WorkerRef, layout: KVLayout) -> TransferError | None:
    if hello.version != VERSION:
        return LayoutMismatch(f"KV frames of version {hello.version}, here {VERSION}")
    if hello.decode != decode:
        return TransferError("another decode worker, or an earlier life of it, was meant")
    if hello.layout_digest != layout.digest():
        return LayoutMismatch(f"KV layout {hello.layout_digest}, here {layout.digest()}")
    try:
        layout_of(hello.share, layout)
    except LayoutMismatch as problem:
        return problem
    return None


def _proof(cluster_key: bytes | None, role: bytes, transcript: bytes) -> bytes:
    if cluster_key is None:
        return b""
    return hmac.digest(cluster_key, role + b"\0" + transcript, "sha256")


def _seal(cluster_key: bytes | None, direction: bytes, transcript: bytes) -> Seal:
    if cluster_key is None:
        return Seal(None)
    return Seal(hashlib.sha256(_proof(cluster_key, direction, transcript)).digest())


def _send(sock: socket.socket, message: bytes, deadline: float) -> None:
    sock.settimeout(max(0.001, deadline - time.monotonic()))
    sock.sendall(_PREFIX.pack(MAGIC, len(message)) + message)


def _receive(sock: socket.socket, deadline: float) -> bytes:
    magic, length = _PREFIX.unpack(_exactly(sock, _PREFIX.size, deadline))
    if magic != MAGIC or length > MAX_MESSAGE_BYTES:
        raise ProtocolError("not a KV handshake")
    return _exactly(sock, length, deadline)


def _exactly(sock: socket.socket, size: int, deadline: float) -> bytes:
    received = bytearray()
    while len(received) < size:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        data = sock.recv(size - len(received))
        if not data:
            raise ConnectionResetError("the peer closed the connection")
        received += data
    return bytes(received)
