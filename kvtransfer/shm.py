"""KV blocks on one host: the source copies straight into the decode rank's granted pages.

The decode rank's memory is an anonymous memfd; after the handshake its descriptor is passed over
the Unix socket. Only small notices follow. The receiver cannot refuse a byte, so the fence is
``one_sided``: nothing is written before OPENED, and an aborted grant's pages are quiet after the
source's DRAINED, or after the end of the connection, which the source closes only when it has
stopped writing. The kernel unmaps a killed process's memory before it closes its sockets.
"""

import ctypes
import fcntl
import os
import secrets
import socket
from collections.abc import Callable, Sequence

from isal.isal_zlib import crc32

from kvtransfer.checksum import PIECE_BYTES
from kvtransfer.frames import Frame, Kind, encode
from kvtransfer.handshake import Connected
from kvtransfer.interface import Fence, KVMemory
from kvtransfer.memory import buffer, map_shared
from kvtransfer.outlet import send_all
from kvtransfer.plan import Chunk, Extent, extents, spans
from protocol.errors import TransferError
from protocol.ids import BlockId, Generation

FENCE: Fence = "one_sided"


def listen() -> tuple[socket.socket, str]:
    """A listener with a random abstract name, which vanishes with the process."""
    name = f"headrace-kv-{secrets.token_hex(16)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("\0" + name)
    listener.listen(64)
    return listener, name


def connect(address: str, timeout_s: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect("\0" + address)
    except OSError:
        sock.close()
        raise
    return sock


def host_id() -> str:
    """Equal in two processes exactly when a Unix socket of one can be reached from the other:
    the same boot of the same kernel, and the same network namespace.
    """
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"


def share(sock: socket.socket, memory: KVMemory) -> None:
    """Give the memory to the peer that has just been admitted."""
    assert memory.share is not None
    socket.send_fds(sock, [b"M"], [memory.share])


class ShmInlet:
    """The decode end: the bytes are in place before they are announced."""

    fence: Fence = FENCE

    def receive(self, places: Sequence[Extent], wanted: Callable[[], bool]) -> bool:
        return wanted()

    def discard(self, num_bytes: int) -> None:
        """No bytes follow a notice."""


class ShmOutlet:
    """The prefill end. Takes the descriptor that follows the handshake."""

    def __init__(
        self, sock: socket.socket, memory: KVMemory, connected: Connected, stall_s: float
    ) -> None:
        self._sock = sock
        self._source = memory
        self._seal = connected.outgoing
        self._checksum = connected.checksum
        self._stall_s = stall_s
        self._target = map_shared(memory.layout, connected.num_blocks, _receive_fd(sock))
        self._view = buffer(memory)

    def write(
        self,
        generation: Generation,
        chunk: Chunk,
        source_blocks: Sequence[BlockId],
        target_blocks: Sequence[BlockId],
    ) -> None:
        layout = self._source.layout
        rows = {"first_layer": chunk.first_layer, "num_layers": chunk.num_layers}
        here = extents(layout, blocks=source_blocks, num_blocks=self._source.num_blocks, **rows)
        there = extents(layout, blocks=target_blocks, num_blocks=self._target.num_blocks, **rows)
        crc = num_bytes = 0
        for source, destination, length in spans(here, there):
            crc = self._copy(source, destination, length, crc)
            num_bytes += length
        frame = Frame(Kind.CHUNK, generation, chunk, num_bytes, crc)
        send_all(self._sock, [encode(frame, self._seal)], self._stall_s)

    def _copy(self, source: int, destination: int, length: int, crc: int) -> int:
        """Copies, and with a checksum reads each piece again while the core still has it."""
        to, here = self._target.address + destination, self._source.address + source
        if self._checksum == "off":
            ctypes.memmove(to, here, length)
            return 0
        for at in range(0, length, PIECE_BYTES):
            step = min(PIECE_BYTES, length - at)
            ctypes.memmove(to + at, here + at, step)
            crc = crc32(self._view[source + at : source + at + step], crc)
        return crc


def _receive_fd(sock: socket.socket) -> int:
    try:
        _, descriptors, _, _ = socket.recv_fds(sock, 1, 1)
    except OSError as error:
        raise TransferError(f"the decode rank shared no memory: {error}") from error
    if not descriptors:
        raise TransferError("the decode rank shared no memory")
    fcntl.fcntl(descriptors[0], fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    return descriptors[0]
