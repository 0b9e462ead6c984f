"""KV blocks between hosts: frames over TCP, from KV memory to KV memory without a copy between.

The sender gathers a chunk's pages into ``sendmsg``; the receiver has checked the chunk's header
against its ledger before it scatters the bytes into the granted pages, and looks again whenever
bytes arrive. So the fence is ``receiver_checked``: bytes for a grant that has ended are read and
thrown away, and an aborted grant is quiet as soon as the receiver has looked.
"""

import importlib
import socket
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, NamedTuple

from isal.isal_zlib import crc32

from kvtransfer.carrier import Receiving, Sending, Transport
from kvtransfer.frames import NO_GRANT, Frame, Kind, Seal, check_tag, decode, encode
from kvtransfer.inlet import Inlet, Reader
from kvtransfer.interface import Fence, KVMemory
from kvtransfer.outlet import Outlet, send_all
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

    def outlet(self, sending: Sending) -> Outlet:
        if sending.connected.payload == "exact":
            return TcpOutlet(sending)
        packed: Outlet = importlib.import_module("kvtransfer.packed").PackedOutlet(sending)
        return packed

    def inlet(self, receiving: Receiving) -> Inlet:
        if receiving.payload == "exact":
            return TcpInlet(receiving)
        packed: Inlet = importlib.import_module("kvtransfer.packed").PackedInlet(receiving)
        return packed

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
            unsummed = Frame(Kind.CHUNK, generation, chunk, length)
            send_checked(self._sock, self._seal, unsummed, places)
            return
        crc = self._pages.crc(self._checksum, chunk, source_blocks)
        header = encode(Frame(Kind.CHUNK, generation, chunk, length, crc), self._seal)
        send_all(self._sock, [header, *places])

    def probe(self, num_bytes: int) -> None:
        header = Frame(Kind.PROBE, NO_GRANT, length=num_bytes)
        made_up = self._pages.view[:num_bytes]
        if self._checksum == "full":
            send_checked(self._sock, self._seal, header, [made_up])
        else:
            send_all(self._sock, [encode(header, self._seal), made_up])

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
        self._pages = HostPages(receiving.memory, receiving.share)
        self._last = Received(complete=False, crc=0, expected=1)

    def receive(self, chunk: Chunk, blocks: Sequence[BlockId], wanted: Callable[[], bool]) -> bool:
        places = self._pages.places(chunk, blocks)
        if self._checksum != "full":
            return self._reader.fill(places, wanted)
        self._last = read_checked(self._reader, self._seal, places, wanted)
        return self._last.complete

    def discard(self, num_bytes: int) -> None:
        self._reader.discard(num_bytes)
        if self._checksum == "full":
            read_check(self._reader, self._seal)

    def is_intact(self, crc: int, chunk: Chunk, blocks: Sequence[BlockId]) -> bool:
        if self._checksum == "full":
            return self._last.crc == self._last.expected
        return crc == self._pages.crc(self._checksum, chunk, blocks)

    def wait_until_quiet(self, stopped: bool) -> None:
        """Only this thread writes into the pages."""

    def close(self) -> None:
        """Nothing is held."""


class Received(NamedTuple):
    """``crc`` of the bytes as they came, ``expected`` as their sender says."""

    complete: bool
    crc: int
    expected: int


def send_checked(
    sock: socket.socket, seal: Seal, header: Frame, places: Sequence[memoryview]
) -> None:
    """A frame with bytes, and behind them their CRC, taken slice by slice.

    Raises:
        TransferTimeout, OSError: as ``send_all``.
    """
    crc, before = 0, [encode(header, seal)]
    for part in slices(places, SLICE_BYTES):
        for place in part:
            crc = crc32(place, crc)
        send_all(sock, [*before, *part])
        before = []
    send_all(sock, [*before, encode(Frame(Kind.CHECK, header.generation, crc=crc), seal)])


def read_checked(
    reader: Reader, seal: Seal, places: Sequence[memoryview], wanted: Callable[[], bool]
) -> Received:
    """The bytes behind a header that ``send_checked`` has sent. Raises as ``Inlet.receive``."""
    crc, complete = 0, True
    for part in slices(places, SLICE_BYTES):
        if not complete:
            reader.discard(sum(map(len, part)))
            continue
        complete = reader.fill(part, wanted)
        for place in part:
            crc = crc32(place, crc)
    return Received(complete, crc, read_check(reader, seal))


def read_check(reader: Reader, seal: Seal) -> int:
    """The CRC that follows a frame's bytes."""
    header = reader.header()
    if header is None:
        raise ConnectionResetError("the KV peer has gone inside a frame")
    frame = decode(header, _CHECK)
    check_tag(header, b"", seal)
    return frame.crc
