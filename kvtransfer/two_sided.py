"""A chunk as one send that meets one receive: for communicators that match by order alone.

Each chunk's header goes over the connection's socket and its bytes over the communicator, posted by
both ends in the order of the headers. So order of posting is the match, and every header is met by
exactly one receive, also where its bytes are thrown away. The receiver receives into staging, looks
at its ledger and only then scatters: ``receiver_checked``. There is no taking back a posted
operation, so a deadline that passes and a peer that goes abort the communicator, which ends both
sides' operations; the connection ends with it, and the next one has a communicator of its own.
"""

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from kvtransfer.checksum import Checksum
from kvtransfer.completion import wait_until
from kvtransfer.frames import NO_GRANT, Frame, Kind, Seal, encode
from kvtransfer.outlet import send_all
from kvtransfer.plan import Chunk
from protocol.errors import TransferTimeout
from protocol.ids import BlockId, Generation

Row = TypeVar("Row")
Row_contra = TypeVar("Row_contra", contravariant=True)


class StagedPages(Protocol[Row]):
    """A rank's blocks, and rows of memory beside them that a communicator can reach."""

    def num_bytes(self, chunk: Chunk) -> int: ...
    def staging(self, num_bytes: int) -> Row: ...
    def after(self, ready: object) -> None: ...
    def gather(self, chunk: Chunk, blocks: Sequence[BlockId], row: Row) -> None: ...
    def scatter(self, chunk: Chunk, blocks: Sequence[BlockId], row: Row) -> None: ...
    def crc(self, checksum: Checksum, chunk: Chunk, blocks: Sequence[BlockId]) -> int: ...


class Communicator(Protocol[Row_contra]):
    """Two ranks. What is posted runs behind what the pages have queued before, in order."""

    def post_send(self, row: Row_contra, num_bytes: int) -> Callable[[], bool]:
        """The answer tells whether it is over, and raises ``OSError`` where it never will be."""
        ...

    def post_receive(self, row: Row_contra, num_bytes: int) -> Callable[[], bool]: ...

    def queued(self) -> Callable[[], bool]:
        """Whether all that the pages have queued so far is over."""
        ...

    def abort(self) -> None:
        """End both sides' operations, also those that wait for a peer that has gone."""
        ...


class TwoSidedOutlet(Generic[Row]):
    """The prefill end."""

    def __init__(
        self,
        sock: socket.socket,
        pages: StagedPages[Row],
        communicator: Communicator[Row],
        *,
        checksum: Checksum,
        seal: Seal,
        stall_s: float,
        frame_bytes: int,
    ) -> None:
        self._sock = sock
        self._pages = pages
        self._communicator = communicator
        self._checksum = checksum
        self._seal = seal
        self._stall_s = stall_s
        self.frame_bytes = frame_bytes
        self._row = pages.staging(frame_bytes)

    def after(self, ready: object) -> None:
        self._pages.after(ready)

    def write(
        self,
        generation: Generation,
        chunk: Chunk,
        source_blocks: Sequence[BlockId],
        target_blocks: Sequence[BlockId],
    ) -> None:
        length = self._pages.num_bytes(chunk)
        crc = self._pages.crc(self._checksum, chunk, source_blocks)
        self._pages.gather(chunk, source_blocks, self._row)
        self._send(Frame(Kind.CHUNK, generation, chunk, length, crc))

    def probe(self, num_bytes: int) -> None:
        self._send(Frame(Kind.PROBE, NO_GRANT, length=num_bytes))

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self._communicator.abort()

    def _send(self, header: Frame) -> None:
        send_all(self._sock, [encode(header, self._seal)])
        late = TransferTimeout(f"the decode rank has taken nothing for {self._stall_s} s")
        with aborting(self._communicator):
            done = self._communicator.post_send(self._row, header.length)
            wait_until(done, self._sock, self._stall_s, late)


class TwoSidedInlet(Generic[Row]):
    """The decode end."""

    def __init__(
        self,
        sock: socket.socket,
        pages: StagedPages[Row],
        communicator: Communicator[Row],
        *,
        checksum: Checksum,
        stall_s: float,
        max_bytes: int,
    ) -> None:
        self._sock = sock
        self._pages = pages
        self._communicator = communicator
        self._checksum = checksum
        self._stall_s = stall_s
        self._max_bytes = max_bytes
        self._row = pages.staging(max_bytes)

    def receive(self, chunk: Chunk, blocks: Sequence[BlockId], wanted: Callable[[], bool]) -> bool:
        self.discard(self._pages.num_bytes(chunk))
        if not wanted():
            return False
        self._pages.scatter(chunk, blocks, self._row)
        with aborting(self._communicator):
            self._wait(self._communicator.queued())
        return True

    def discard(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise ConnectionAbortedError(f"a chunk of {num_bytes} bytes, staging {self._max_bytes}")
        with aborting(self._communicator):
            self._wait(self._communicator.post_receive(self._row, num_bytes))

    def is_intact(self, crc: int, chunk: Chunk, blocks: Sequence[BlockId]) -> bool:
        return crc == self._pages.crc(self._checksum, chunk, blocks)

    def wait_until_quiet(self, stopped: bool) -> None:
        """Only this thread's copies write into the pages, and each has been waited for."""

    def close(self) -> None:
        self._communicator.abort()

    def _wait(self, done: Callable[[], bool]) -> None:
        late = TimeoutError("the prefill worker has stopped inside a chunk")
        wait_until(done, self._sock, self._stall_s, late)


@contextlib.contextmanager
def aborting(communicator: Communicator[Row]) -> Iterator[None]:
    """Whatever goes wrong inside ends the communicator."""
    try:
        yield
    except BaseException:
        communicator.abort()
        raise
