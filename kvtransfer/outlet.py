"""The sending end of a connection: what a transport does for a push, and bounded writes."""

import socket
import struct
from collections.abc import Sequence
from typing import Protocol

from kvtransfer.plan import Chunk
from protocol.errors import TransferTimeout
from protocol.ids import BlockId, Generation

MAX_BUFFERS = 1024  # IOV_MAX


class Outlet(Protocol):
    """Called by one thread only, so that nothing is being written whenever it is not inside."""

    @property
    def frame_bytes(self) -> int:
        """The most that ``write`` is to be given at once, but for one block of one layer."""
        ...

    def after(self, ready: object) -> None:
        """What is written from now on may be read only when this event of the engine has come."""
        ...

    def write(
        self,
        generation: Generation,
        chunk: Chunk,
        source_blocks: Sequence[BlockId],
        target_blocks: Sequence[BlockId],
    ) -> None:
        """Deliver one chunk; the source blocks are no longer read on return.

        Raises:
            TransferTimeout, OSError: the connection is of no more use.
        """
        ...

    def probe(self, num_bytes: int) -> float | None:
        """Move so many bytes that nobody wants, at most a frame: bytes in a second, or None where
        the peer will answer each call by PROBED. Raises as ``write``.
        """
        ...

    def flush(self) -> None:
        """Announce all that has been written; due before any control frame. Raises as ``write``."""
        ...

    def close(self) -> None:
        """Nothing is being written, or ever will be, when this returns."""
        ...


def bound_sends(sock: socket.socket, stall_s: float) -> None:
    """Let each send wait in the kernel, which wakes this thread far less often than a poll does,
    and at most for ``stall_s`` without progress.
    """
    sock.settimeout(None)
    seconds, fraction = divmod(stall_s, 1)
    moment = struct.pack("ll", int(seconds), int(fraction * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, moment)


def send_all(sock: socket.socket, buffers: Sequence[bytes | memoryview]) -> None:
    """Send every byte, straight from where it lies. ``sock`` has been bounded.

    Raises:
        TransferTimeout: the peer has taken nothing for the bound; half a frame may be out.
    """
    left = [memoryview(data) for data in buffers if len(data)]
    while left:
        try:
            sent = sock.sendmsg(left[:MAX_BUFFERS], [], socket.MSG_NOSIGNAL)
        except BlockingIOError:
            raise TransferTimeout("the KV peer has taken nothing for too long") from None
        done = 0
        while done < len(left) and sent >= len(left[done]):
            sent -= len(left[done])
            done += 1
        del left[:done]
        if sent:
            left[0] = left[0][sent:]
