"""KV blocks on one host: the source copies straight into the decode rank's granted pages.

The decode rank's memory is an anonymous memfd; after the handshake its descriptor is passed over
the Unix socket. Only small notices follow. The receiver cannot refuse a byte, so the fence is
``one_sided``: nothing is written before OPENED, and an aborted grant's pages are quiet after the
source's DRAINED, or after the end of the connection, which the source closes only when it has
stopped writing. The kernel unmaps a killed process's memory before it closes its sockets.
"""

import fcntl
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

from kvtransfer.carrier import Receiving, Sending, Transport
from kvtransfer.checksum import chunk_crc
from kvtransfer.frames import Frame, Kind, encode
from kvtransfer.interface import Fence, KVMemory
from kvtransfer.memory import buffer, map_shared
from kvtransfer.outlet import send_all
from kvtransfer.pages import HostPages
from kvtransfer.plan import Chunk, Geometry, check_blocks, runs
from kvtransfer.runs import RunCopier
from kvtransfer.shares import places_of
from protocol.errors import TransferError
from protocol.ids import BlockId, Generation, WorkerRef

_PROBE_READS = 4
_ANNOUNCE_BYTES = 8 * 1024 * 1024  # waking the other process costs as much as copying 100 KB


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


def process_id() -> str:
    """Equal in two places of one host exactly when they are one process."""
    with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
        started = file.read().rpartition(")")[2].split()[19]
    return f"{os.getpid()}/{started}"


class ShmCarrier:
    name: ClassVar[Transport] = "shm"
    control: ClassVar[Literal["unix", "tcp"]] = "unix"
    fence: ClassVar[Fence] = "one_sided"
    on_device: ClassVar[bool] = False

    def problem(self, memory: KVMemory) -> str | None:
        return None

    def prepare(self, memory: KVMemory, worker: WorkerRef) -> None:
        """Nothing is shared."""

    def outlet(self, sending: Sending) -> "ShmOutlet":
        return ShmOutlet(sending)

    def inlet(self, receiving: Receiving) -> "ShmInlet":
        return ShmInlet(receiving)

    def close(self) -> None:
        """Nothing is shared."""


class ShmInlet:
    """The decode end: the bytes are in place before they are announced."""

    def __init__(self, receiving: Receiving) -> None:
        _share(receiving.sock, receiving.memory)
        self._reader = receiving.reader
        self._pages = HostPages(receiving.memory, receiving.share)
        self._checksum = receiving.checksum

    def receive(
        self,
        chunk: Chunk,
        blocks: Sequence[BlockId],
        wanted: Callable[[], bool],
    ) -> bool:
        return wanted()

    def discard(self, num_bytes: int) -> None:
        """No bytes follow a notice."""

    def is_intact(self, crc: int, chunk: Chunk, blocks: Sequence[BlockId]) -> bool:
        return crc == self._pages.crc(self._checksum, chunk, blocks)

    def wait_until_quiet(self, stopped: bool) -> None:
        """The end of the stream, as the peer or its death makes it."""
        self._reader.wait_for_end()

    def close(self) -> None:
        """Nothing is held."""


class ShmOutlet:
    """The prefill end. Takes the descriptor that follows the handshake."""

    def __init__(self, sending: Sending) -> None:
        sock, memory, connected = sending.sock, sending.memory, sending.connected
        limits = sending.limits
        whole = sending.whole
        target = map_shared(whole, connected.num_blocks, _receive_fd(sock))
        self._sock = sock
        self._seal = connected.outgoing
        self._checksum = connected.checksum
        self.frame_bytes = limits.shm_frame_bytes
        self._view = buffer(memory)
        self._geometry = Geometry(memory.layout, memory.num_blocks, first_layer=memory.first_layer)
        self._target = target
        self._copier = RunCopier(memory, target, places_of(sending.share, whole))
        self._notices: list[bytes] = []
        self._unannounced_bytes = 0

    def after(self, ready: object) -> None:
        """The bytes are in host memory when they are handed over."""

    def write(
        self,
        generation: Generation,
        chunk: Chunk,
        source_blocks: Sequence[BlockId],
        target_blocks: Sequence[BlockId],
    ) -> None:
        check_blocks(target_blocks, self._target.num_blocks, side="granted")
        self._copier.copy(chunk, runs(source_blocks, target_blocks))
        crc = chunk_crc(self._checksum, self._view, self._geometry, chunk, source_blocks)
        length = chunk.num_layers * chunk.num_blocks * self._geometry.unit
        notice = Frame(Kind.CHUNK, generation, chunk, length, crc)
        self._notices.append(encode(notice, self._seal))
        self._unannounced_bytes += length
        if self._unannounced_bytes >= _ANNOUNCE_BYTES:
            self.flush()

    def probe(self, num_bytes: int) -> float:
        """Reads the decode rank's memory: only a granted page may be written."""
        mapped = buffer(self._target)
        num_bytes = min(num_bytes, len(mapped))
        here = bytearray(mapped[:num_bytes])
        shortest = float("inf")
        for _ in range(_PROBE_READS):
            started = time.perf_counter()
            here[:] = mapped[:num_bytes]
            shortest = min(shortest, time.perf_counter() - started)
        return num_bytes / shortest

    def flush(self) -> None:
        if self._notices:
            notices, self._notices, self._unannounced_bytes = self._notices, [], 0
            send_all(self._sock, notices)

    def close(self) -> None:
        """This thread alone writes, so nothing is being written now."""


def _share(sock: socket.socket, memory: KVMemory) -> None:
    """Give the memory to the peer that has just been admitted."""
    assert memory.share is not None
    socket.send_fds(sock, [b"M"], [memory.share])


def _receive_fd(sock: socket.socket) -> int:
    try:
        _, descriptors, _, _ = socket.recv_fds(sock, 1, 1)
    except OSError as error:
        raise TransferError(f"the decode rank shared no memory: {error}") from error
    if not descriptors:
        raise TransferError("the decode rank shared no memory")
    fcntl.fcntl(descriptors[0], fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    return descriptors[0]
