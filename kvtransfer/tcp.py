"""KV blocks between hosts: frames over TCP, from KV memory to KV memory without a copy between.

The sender gathers a chunk's pages into ``sendmsg``; the receiver has checked the chunk's header
against its ledger before it scatters the bytes into the granted pages, and looks again whenever
bytes arrive. So the fence is ``receiver_checked``: bytes for a grant that has ended are read and
thrown away, and an aborted grant is quiet as soon as the receiver has looked.
"""

import socket
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

from isal.isal_zlib import crc32

from kvtransfer.carrier import Receiving, Sending, Transport
from kvtransfer.frames import NO_GRANT, Frame, Kind, check_tag, decode, encode
from kvtransfer.interface import Fence, KVMemory
from kvtransfer.outlet import send_all
from kvtransfer.pages import HostPages
from kvtransfer.plan import Chunk, slices
from protocol.ids import BlockId, Generation, WorkerRef

SLICE_BYTES = 512 * 1024
"""What is summed and then sent, or received and then summed, while it is in the core's cache. There
a CRC costs a fifth of what it costs from memory."""
_CHECK = frozenset({Kind.CHECK})
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


class TcpCarrier:
    name: ClassVar[Transport] = "tcp"
    control: ClassVar[Literal["unix", "tcp"]] = "tcp"
    fence: ClassVar[Fence] = "receiver_checked"
    on_device: ClassVar[bool] = False

    def problem(self, memory: KVMemory) -> str | None:
        return None

    def prepare(self, memory: KVMemory, worker: WorkerRef) -> None:
        """Nothing is shared."""

    def outlet(self, sending: Sending) -> "TcpOutlet":
        return TcpOutlet(sending)

    def inlet(self, receiving: Receiving) -> "TcpInlet":
        return TcpInlet(receiving)

    def close(self) -> None:
        """Nothing is shared."""


class TcpOutlet:
    """The prefill end."""

    def __init__(self, sending: Sending) -> None:
        self._sock = sending.sock
        self._pages = HostPages(sending.memory)
        self._seal = sending.connected.outgoing
        self._checksum = sending.connected.checksum
        self.frame_bytes = sending.limits.tcp_frame_bytes

    def after(self, ready: object) -> None:
        """The bytes are in host memory when they are handed over."""

    def write(
        self,
        generation: Generation,
        chunk: Chunk,
        source_blocks: Sequence[BlockId],
        target_blocks: Sequence[BlockId],
    ) -> None:
        length = self._pages.num_bytes(chunk)
        places = self._pages.places(chunk, source_blocks)
        if self._checksum == "full":
            header = encode(Frame(Kind.CHUNK, generation, chunk, length), self._seal)
            self._send_checked(header, places, generation)
            return
        crc = self._pages.crc(self._checksum, chunk, source_blocks)
        header = encode(Frame(Kind.CHUNK, generation, chunk, length, crc), self._seal)
        send_all(self._sock, [header, *places])

    def _send_checked(
        self, header: bytes, places: list[memoryview], generation: Generation
    ) -> None:
        crc, before = 0, [header]
        for part in slices(places, SLICE_BYTES):
            for place in part:
                crc = crc32(place, crc)
            send_all(self._sock, [*before, *part])
            before = []
        check = encode(Frame(Kind.CHECK, generation, crc=crc), self._seal)
        send_all(self._sock, [*before, check])

    def probe(self, num_bytes: int) -> None:
        header = encode(Frame(Kind.PROBE, NO_GRANT, length=num_bytes), self._seal)
        if self._checksum == "full":
            self._send_checked(header, [self._pages.view[:num_bytes]], NO_GRANT)
        else:
            send_all(self._sock, [header, self._pages.view[:num_bytes]])

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Nothing is held."""


class TcpInlet:
    """The decode end."""

    def __init__(self, receiving: Receiving) -> None:
        self._reader = receiving.reader
        self._seal = receiving.admitted.incoming
        self._checksum = receiving.checksum
        self._pages = HostPages(receiving.memory)
        self._crc = 0  # of the last chunk: as received, and as its sender says
        self._expected = 0

    def receive(self, chunk: Chunk, blocks: Sequence[BlockId], wanted: Callable[[], bool]) -> bool:
        places = self._pages.places(chunk, blocks)
        if self._checksum != "full":
            return self._reader.fill(places, wanted)
        self._crc, complete = 0, True
        for part in slices(places, SLICE_BYTES):
            if not complete:
                self._reader.discard(sum(map(len, part)))
                continue
            complete = self._reader.fill(part, wanted)
            for place in part:
                self._crc = crc32(place, self._crc)
        self._expected = self._check()
        return complete

    def discard(self, num_bytes: int) -> None:
        self._reader.discard(num_bytes)
        if self._checksum == "full":
            self._check()

    def is_intact(self, crc: int, chunk: Chunk, blocks: Sequence[BlockId]) -> bool:
        if self._checksum == "full":
            return self._crc == self._expected
        return crc == self._pages.crc(self._checksum, chunk, blocks)

    def wait_until_quiet(self, stopped: bool) -> None:
        """Only this thread writes into the pages."""

    def close(self) -> None:
        """Nothing is held."""

    def _check(self) -> int:
        """The CRC that follows a chunk."""
        header = self._reader.header()
        if header is None:
            raise ConnectionResetError("the KV peer has gone inside a frame")
        frame = decode(header, _CHECK)
        check_tag(header, b"", self._seal)
        return frame.crc
