"""KV over TCP as 8-bit floats: half of the bytes, and no longer what was computed, bit for bit.

The length in a CHUNK's header stays that of the blocks; both ends know how many packed bytes follow
it. Their CRC comes behind them, and nothing is unpacked into a block before it has matched.
"""

import socket
from collections.abc import Callable, Sequence

import torch

from kvtransfer import tcp
from kvtransfer.carrier import Receiving, Sending
from kvtransfer.fp8 import pack, packed_bytes, unpack
from kvtransfer.frames import NO_GRANT, Frame, Kind
from kvtransfer.pages import HostPages
from kvtransfer.plan import Chunk
from kvtransfer.shares import layout_of
from protocol.ids import BlockId, Generation


class PackedOutlet:
    """The prefill end."""

    def __init__(self, sending: Sending) -> None:
        self._sock: socket.socket = sending.sock
        self._layout = sending.memory.layout
        self._pages = HostPages(sending.memory)
        self._seal = sending.connected.outgoing
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
        row = bytearray(self._pages.num_bytes(chunk))
        self._pages.gather(chunk, source_blocks, memoryview(row))
        packed = pack(self._layout, torch.frombuffer(row, dtype=torch.uint8))
        self._send(Frame(Kind.CHUNK, generation, chunk, len(row)), memoryview(packed.numpy().data))

    def probe(self, num_bytes: int) -> None:
        made_up = memoryview(bytes(packed_bytes(self._layout, num_bytes)))
        self._send(Frame(Kind.PROBE, NO_GRANT, length=num_bytes), made_up)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Nothing is held."""

    def _send(self, header: Frame, packed: memoryview) -> None:
        tcp.send_checked(self._sock, self._seal, header, [packed])


class PackedInlet:
    """The decode end."""

    def __init__(self, receiving: Receiving) -> None:
        self._reader = receiving.reader
        self._seal = receiving.admitted.incoming
        self._layout = layout_of(receiving.share, receiving.memory.layout)
        self._pages = HostPages(receiving.memory, receiving.share)
        self._intact = False

    def receive(self, chunk: Chunk, blocks: Sequence[BlockId], wanted: Callable[[], bool]) -> bool:
        packed = bytearray(packed_bytes(self._layout, self._pages.num_bytes(chunk)))
        received = tcp.read_checked(self._reader, self._seal, [memoryview(packed)], wanted)
        self._intact = received.crc == received.expected
        if not received.complete or not wanted():
            return False
        if self._intact:
            row = unpack(self._layout, torch.frombuffer(packed, dtype=torch.uint8))
            self._pages.scatter(chunk, blocks, memoryview(row.numpy().data))
        return True

    def discard(self, num_bytes: int) -> None:
        self._reader.discard(packed_bytes(self._layout, num_bytes))
        tcp.read_check(self._reader, self._seal)

    def is_intact(self, crc: int, chunk: Chunk, blocks: Sequence[BlockId]) -> bool:
        return self._intact

    def wait_until_quiet(self, stopped: bool) -> None:
        """Only this thread writes into the pages."""

    def close(self) -> None:
        """Nothing is held."""
