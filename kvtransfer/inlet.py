"""The receiving end of a connection: exact reads that are bounded, and what a transport adds."""

import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from kvtransfer.frames import HEADER_BYTES
from kvtransfer.plan import Chunk
from protocol.ids import BlockId

MAX_BUFFERS = 1024  # IOV_MAX
_LOOK_S = 0.25  # how long a receiver that waits for bytes stays blind to an abort
_SCRATCH_BYTES = 256 * 1024


class Inlet(Protocol):
    """How one transport gets a chunk's bytes into the granted pages."""

    def receive(self, chunk: Chunk, blocks: Sequence[BlockId], wanted: Callable[[], bool]) -> bool:
        """False where the chunk was no longer wanted on the way: the rest was thrown away.

        Raises:
            OSError, ProtocolError: the connection is of no more use.
        """
        ...

    def discard(self, num_bytes: int) -> None:
        """Throw away the bytes of a chunk that must not be written. Raises as ``receive``."""
        ...

    def is_intact(self, crc: int, chunk: Chunk, blocks: Sequence[BlockId]) -> bool:
        """Whether the chunk, all received, is what its sender read; ``crc`` came in its header."""
        ...

    def wait_until_quiet(self, stopped: bool) -> None:
        """After the last frame: return when nothing can write over this connection any more.
        ``stopped``: the peer has said so itself.
        """
        ...

    def close(self) -> None: ...


class Reader:
    """Reads a socket for one thread. Idle between frames is fine, a stall inside one is not."""

    def __init__(self, sock: socket.socket, stall_s: float) -> None:
        self._sock = sock
        self._stall_s = stall_s
        self._header = bytearray(HEADER_BYTES)
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        sock.settimeout(None)
        moment = struct.pack("ll", 0, int(_LOOK_S * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, moment)

    def header(self) -> bytearray | None:
        """The next frame's header, or None where the peer has ended the connection. The buffer
        is used again by the next call.

        Raises:
            OSError: the connection broke, or ended or stalled inside a header.
        """
        first = self._wait([memoryview(self._header)])
        if first == 0:
            return None
        self._fill([memoryview(self._header)[first:]])
        return self._header

    def payload(self, num_bytes: int) -> bytearray:
        payload = bytearray(num_bytes)
        self._fill([memoryview(payload)])
        return payload

    def fill(self, pages: Sequence[memoryview], wanted: Callable[[], bool]) -> bool:
        """Read into ``pages`` end to end; see ``Inlet.receive``."""
        left = self._fill(pages, wanted)
        self.discard(left)
        return left == 0

    def discard(self, num_bytes: int) -> None:
        while num_bytes:
            part = self._scratch[: min(num_bytes, _SCRATCH_BYTES)]
            self._fill([part])
            num_bytes -= len(part)

    def wait_for_end(self) -> None:
        """Read and forget until the peer has ended the connection, however long that takes."""
        try:
            while self._wait([self._scratch]):
                pass
        except ConnectionResetError:
            return  # the peer has closed, with something from us unread

    def _fill(self, pages: Sequence[memoryview], wanted: Callable[[], bool] | None = None) -> int:
        """The number of bytes left unread, 0 unless they were not wanted."""
        left = [page for page in pages if len(page)]
        deadline = time.monotonic() + self._stall_s
        while left:
            if wanted is not None and not wanted():
                return sum(len(page) for page in left)
            try:
                received = self._sock.recvmsg_into(left[:MAX_BUFFERS], 0, socket.MSG_WAITALL)[0]
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError("the KV peer has stopped inside a frame") from None
                continue
            if received == 0:
                raise ConnectionResetError("the KV peer has gone inside a frame")
            deadline = time.monotonic() + self._stall_s
            done = 0
            while done < len(left) and received >= len(left[done]):
                received -= len(left[done])
                done += 1
            del left[:done]
            if received:
                left[0] = left[0][received:]
        return 0

    def _wait(self, pages: Sequence[memoryview]) -> int:
        while True:
            try:
                return self._sock.recvmsg_into(pages)[0]
            except BlockingIOError:
                continue  # nothing to do yet; another thread wakes us by shutting the socket down
