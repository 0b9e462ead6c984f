"""KV blocks between hosts: frames over TCP, from KV memory to KV memory without a copy between.

The sender gathers a chunk's pages into ``sendmsg``; the receiver has checked the chunk's header
against its ledger before it scatters the bytes into the granted pages, and looks again whenever
bytes arrive. So the fence is ``receiver_checked``: bytes for a grant that has ended are read and
thrown away, and an aborted grant is quiet as soon as the receiver has looked.
"""

import socket
from collections.abc import Callable, Sequence

from kvtransfer.checksum import chunk_crc
from kvtransfer.frames import Frame, Kind, encode
from kvtransfer.handshake import Connected
from kvtransfer.inlet import Reader
from kvtransfer.interface import Fence, KVMemory
from kvtransfer.limits import TransferLimits
from kvtransfer.memory import buffer
from kvtransfer.outlet import send_all
from kvtransfer.plan import Chunk, Extent, Geometry
from protocol.ids import BlockId, Generation

FENCE: Fence = "receiver_checked"
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 5, 2, 3


def listen(host: str, port: int, buffer_bytes: int) -> socket.socket:
    """A listener on ``host``; port 0 takes any.

    Raises:
        OSError: the address is taken, or is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        listener.bind((host, port))
        listener.listen(64)
    except OSError:
        listener.close()
        raise
    return listener


def address_of(listener: socket.socket, advertise_host: str) -> str:
    return f"{advertise_host}:{listener.getsockname()[1]}"


def connect(address: str, timeout_s: float, buffer_bytes: int) -> socket.socket:
    host, _, port = address.rpartition(":")
    sock = socket.create_connection((host, int(port)), timeout_s)
    tune(sock, buffer_bytes)
    return sock


def tune(sock: socket.socket, buffer_bytes: int) -> None:
    """No delay for small frames, room for large ones, and notice of a host that has vanished."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


class TcpOutlet:
    """The prefill end."""

    def __init__(
        self, sock: socket.socket, memory: KVMemory, connected: Connected, limits: TransferLimits
    ) -> None:
        self._sock = sock
        self._view = buffer(memory)
        self._geometry = Geometry(memory.layout, memory.num_blocks)
        self._seal = connected.outgoing
        self._checksum = connected.checksum
        self._stall_s = limits.stall_s
        self.frame_bytes = limits.tcp_frame_bytes

    def write(
        self,
        generation: Generation,
        chunk: Chunk,
        source_blocks: Sequence[BlockId],
        target_blocks: Sequence[BlockId],
    ) -> None:
        geometry = self._geometry
        crc = chunk_crc(self._checksum, self._view, geometry, chunk, source_blocks)
        length = chunk.num_layers * chunk.num_blocks * geometry.unit
        header = encode(Frame(Kind.CHUNK, generation, chunk, length, crc), self._seal)
        places = geometry.extents(chunk, source_blocks)
        pages = [self._view[offset : offset + size] for offset, size in places]
        send_all(self._sock, [header, *pages], self._stall_s)

    def flush(self) -> None:
        """Nothing is held back."""


class TcpInlet:
    """The decode end."""

    fence: Fence = FENCE

    def __init__(self, reader: Reader, memory: KVMemory) -> None:
        self._reader = reader
        self._view = buffer(memory)

    def receive(self, places: Sequence[Extent], wanted: Callable[[], bool]) -> bool:
        pages = [self._view[offset : offset + length] for offset, length in places]
        return self._reader.fill(pages, wanted)

    def discard(self, num_bytes: int) -> None:
        self._reader.discard(num_bytes)
