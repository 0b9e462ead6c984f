"""KV blocks by NIXL: the source writes into a landing of the receiver's, which copies them on.

The landing is a ring of slots, registered for this one connection and nothing else, so that a
source can never write into KV memory, and so that bytes still on their way from a dead one reach
nothing that matters. The receiver looks at its ledger before it copies: ``receiver_checked``.
Frames travel on a TCP socket as for ``tcp``; the bytes of a CHUNK follow as one NIXL write, whose
note says that they are in place. The receiver's note gives the slot back.

Both ends make progress themselves while a chunk is under way (``kvtransfer.nixl_agent``). UCX
encrypts and authenticates nothing: it needs a network that strangers are not on.
"""

import ctypes
import mmap
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import msgspec

from kvtransfer import nixl_agent, terms
from kvtransfer.carrier import Receiving, Sending, Transport
from kvtransfer.completion import wait_until
from kvtransfer.frames import NO_GRANT, Frame, Kind, encode
from kvtransfer.interface import Fence, KVMemory
from kvtransfer.nixl_agent import Agent, Piece
from kvtransfer.outlet import send_all
from kvtransfer.pages import HostPages
from kvtransfer.plan import Chunk
from protocol.errors import ConfigError, ProtocolError, TransferError, TransferTimeout
from protocol.ids import BlockId, Generation, WorkerRef

MAX_PIECES = 16  # a longer list of places is gathered first: each costs UCX more than the copy
_NOTE = struct.Struct("<Q")


class Landing(msgspec.Struct, frozen=True, kw_only=True):
    """What the source must know of the receiver."""

    agent: str
    metadata: bytes
    address: int
    num_slots: int
    slot_bytes: int


class Writer(msgspec.Struct, frozen=True, kw_only=True):
    """What the receiver must know of the source, to give slots back."""

    agent: str
    metadata: bytes


class NixlCarrier:
    name: ClassVar[Transport] = "nixl"
    control: ClassVar[Literal["unix", "tcp"]] = "tcp"
    fence: ClassVar[Fence] = "receiver_checked"
    on_device: ClassVar[bool] = False

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._writer: Agent | None = None  # of all outlets: the KV memory is registered once

    def problem(self, memory: KVMemory) -> str | None:
        try:
            nixl_agent.library()
        except ConfigError as error:
            return str(error)
        return None

    def prepare(self, memory: KVMemory, worker: WorkerRef) -> None:
        with self._lock:
            if self._writer is None:
                writer = Agent(worker.worker_id)
                writer.register(memory.address, memory.num_bytes, "DRAM")
                self._writer = writer

    def outlet(self, sending: Sending) -> "NixlOutlet":
        writer = self._writer
        if writer is None:
            raise TransferError("the prefill worker is shutting down")
        return NixlOutlet(sending, writer)

    def inlet(self, receiving: Receiving) -> "NixlInlet":
        return NixlInlet(receiving)

    def close(self) -> None:
        with self._lock:
            if self._writer is not None:
                self._writer.close()
                self._writer = None


class _Ring:
    """Slots of private memory, registered with an agent."""

    def __init__(self, agent: Agent, num_slots: int, slot_bytes: int) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._memory = mmap.mmap(-1, num_slots * slot_bytes)
        self._view = memoryview(self._memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        agent.register(self.address, len(self._memory), "DRAM")

    def slot(self, number: int) -> memoryview:
        first = number % self.num_slots * self.slot_bytes
        return self._view[first : first + self.slot_bytes]

    def slot_address(self, number: int) -> int:
        return self.address + number % self.num_slots * self.slot_bytes


class NixlOutlet:
    """The prefill end."""

    def __init__(self, sending: Sending, agent: Agent) -> None:
        limits, connected = sending.limits, sending.connected
        landing = msgspec.msgpack.decode(
            terms.hear(sending.sock, connected.incoming, limits.handshake_s), type=Landing
        )
        self._pages = HostPages(sending.memory)
        if landing.num_slots < 1 or landing.slot_bytes < self._pages.geometry.unit:
            raise TransferError("the decode rank's landing does not hold one block")
        self._landing = landing
        self._address = sending.memory.address
        self._agent = agent
        self._sock = sending.sock
        self._seal = connected.outgoing
        self._checksum = connected.checksum
        self._stall_s = limits.stall_s
        self.frame_bytes = min(landing.slot_bytes, limits.nixl_frame_bytes)
        self._staging: _Ring | None = None
        self._posted = 0
        self._freed = 0
        agent.meet(landing.agent, landing.metadata)
        writer = Writer(agent=agent.name, metadata=agent.metadata())
        terms.tell(
            sending.sock, connected.outgoing, msgspec.msgpack.encode(writer), limits.handshake_s
        )

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
        crc = self._pages.crc(self._checksum, chunk, source_blocks)
        header = encode(Frame(Kind.CHUNK, generation, chunk, length, crc), self._seal)
        self._send(header, self._source(chunk, source_blocks, length))

    def _send(self, header: bytes, source: list[Piece]) -> None:
        self._wait(self._has_slot, "given no landing slot back")
        number, self._posted = self._posted, self._posted + 1
        send_all(self._sock, [header])
        to = self._landing.address + number % self._landing.num_slots * self._landing.slot_bytes
        target: list[Piece] = []
        for _, size, _ in source:
            target.append((to, size, 0))
            to += size
        agent = self._agent
        write = agent.write(
            self._landing.agent, source, target, ("DRAM", "DRAM"), _NOTE.pack(number)
        )
        try:
            self._wait(lambda: agent.is_done(write), "taken nothing")
        finally:
            agent.forget(write)

    def probe(self, num_bytes: int) -> None:
        header = encode(Frame(Kind.PROBE, NO_GRANT, length=num_bytes), self._seal)
        self._send(header, [(self._address, num_bytes, 0)])

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self._agent.part(self._landing.agent)

    def _source(self, chunk: Chunk, blocks: Sequence[BlockId], length: int) -> list[Piece]:
        extents = self._pages.geometry.extents(chunk, blocks)
        if len(extents) <= MAX_PIECES:
            return [(self._address + offset, size, 0) for offset, size in extents]
        if self._staging is None:  # one slot: a write is over before the next one begins
            self._staging = _Ring(self._agent, 1, self._landing.slot_bytes)
        self._pages.gather(chunk, blocks, self._staging.slot(0))
        return [(self._staging.address, length, 0)]

    def _has_slot(self) -> bool:
        if self._posted - self._freed < self._landing.num_slots:
            return True
        self._freed += len(self._agent.heard(self._landing.agent))
        return self._posted - self._freed < self._landing.num_slots

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        error = TransferTimeout(f"the decode rank has {what} for {self._stall_s} s")
        wait_until(done, self._sock, self._stall_s, error)


class NixlInlet:
    """The decode end."""

    def __init__(self, receiving: Receiving) -> None:
        limits, admitted = receiving.limits, receiving.admitted
        self._sock = receiving.sock
        self._stall_s = limits.stall_s
        self._pages = HostPages(receiving.memory, receiving.share)
        self._checksum = receiving.checksum
        slot_bytes = max(limits.nixl_frame_bytes, self._pages.geometry.carried)
        self._taken = 0
        self._notes: deque[bytes] = deque()
        self._agent = Agent(receiving.worker.worker_id)
        try:
            self._ring = _Ring(self._agent, limits.nixl_slots, slot_bytes)
            landing = Landing(
                agent=self._agent.name,
                metadata=self._agent.metadata(),
                address=self._ring.address,
                num_slots=limits.nixl_slots,
                slot_bytes=slot_bytes,
            )
            terms.tell(
                self._sock, admitted.outgoing, msgspec.msgpack.encode(landing), limits.handshake_s
            )
            answer = terms.hear(self._sock, admitted.incoming, limits.handshake_s)
            writer = msgspec.msgpack.decode(answer, type=Writer)
            self._writer = writer.agent
            self._agent.meet(writer.agent, writer.metadata)
        except BaseException:
            self._agent.close()
            raise

    def receive(self, chunk: Chunk, blocks: Sequence[BlockId], wanted: Callable[[], bool]) -> bool:
        number = self._arrived()
        copied = wanted()
        if copied:
            self._pages.scatter(chunk, blocks, self._ring.slot(number))
        self._agent.say(self._writer, _NOTE.pack(number))
        return copied

    def discard(self, num_bytes: int) -> None:
        if num_bytes:
            self._agent.say(self._writer, _NOTE.pack(self._arrived()))

    def is_intact(self, crc: int, chunk: Chunk, blocks: Sequence[BlockId]) -> bool:
        return crc == self._pages.crc(self._checksum, chunk, blocks)

    def wait_until_quiet(self, stopped: bool) -> None:
        """Only this thread writes into the pages."""

    def close(self) -> None:
        self._agent.close()

    def _arrived(self) -> int:
        """The number of the next chunk, whose bytes are in its slot."""
        number, self._taken = self._taken, self._taken + 1
        error = TimeoutError("the prefill worker has stopped inside a chunk")
        wait_until(lambda: self._heard(number), self._sock, self._stall_s, error)
        return number

    def _heard(self, number: int) -> bool:
        self._notes += self._agent.heard(self._writer)
        if not self._notes:
            return False
        if self._notes.popleft() != _NOTE.pack(number):
            raise ProtocolError("a NIXL note that does not fit the chunk")
        return True
