"""KV blocks between GPUs of one host: the source copies straight into the granted pages.

The decode rank gives the handle of its memory's allocation over the authenticated Unix socket; the
source opens it once for the connection, that is, for one life of both ends, and closes it with it.
Nobody can refuse a byte, so the fence is ``one_sided``: a page is quiet when the source has drained
or said that it has stopped. A process that dies closes its sockets before the driver has stopped
its copies, so the end of the connection is no proof here: that is the end of the process itself.
"""

import os
import select
import socket
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import msgspec
import torch

from kvtransfer import cuda, terms
from kvtransfer.carrier import Receiving, Sending, Transport
from kvtransfer.completion import wait_until
from kvtransfer.cuda import DevicePages
from kvtransfer.frames import Frame, Kind, encode
from kvtransfer.interface import Fence, KVMemory
from kvtransfer.outlet import send_all
from kvtransfer.plan import Chunk, Run, check_blocks, runs
from kvtransfer.shares import places_of
from protocol.errors import TransferError, TransferTimeout
from protocol.ids import BlockId, Generation, WorkerRef

_DEVICE_TO_DEVICE = 3
_LAZY_PEER_ACCESS = 1
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """The decode rank's memory: an allocation's handle, and where in it the blocks begin."""

    gpu: str
    handle: bytes
    offset: int


class CudaIpcCarrier:
    name: ClassVar[Transport] = "cuda_ipc"
    control: ClassVar[Literal["unix", "tcp"]] = "unix"
    fence: ClassVar[Fence] = "one_sided"
    on_device: ClassVar[bool] = True

    def problem(self, memory: KVMemory) -> str | None:
        return cuda.problem(memory)

    def prepare(self, memory: KVMemory, worker: WorkerRef) -> None:
        """Nothing is shared."""

    def outlet(self, sending: Sending) -> "CudaIpcOutlet":
        return CudaIpcOutlet(sending)

    def inlet(self, receiving: Receiving) -> "CudaIpcInlet":
        return CudaIpcInlet(receiving)

    def close(self) -> None:
        """Nothing is shared."""


class CudaIpcInlet:
    """The decode end: the bytes are in place before they are announced."""

    def __init__(self, receiving: Receiving) -> None:
        self._process = process_of(receiving.sock)
        self._reader = receiving.reader
        self._pages = DevicePages(receiving.memory, receiving.share)
        self._checksum = receiving.checksum
        memory = receiving.memory
        assert memory.device is not None
        base, size = cuda.allocation_of(memory.address)
        if memory.address + memory.num_bytes > base + size:
            raise TransferError("the KV memory is more than one CUDA allocation")
        with torch.cuda.device(memory.device):
            handle = cuda.library().cuda.runtime.ipcGetMemHandle(base)
        window = Window(
            gpu=cuda.gpu_id(memory.device), handle=bytes(handle), offset=memory.address - base
        )
        answer = msgspec.msgpack.encode(window)
        limits = receiving.limits
        terms.tell(receiving.sock, receiving.admitted.outgoing, answer, limits.handshake_s)

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
        if not stopped:
            wait_for_exit(self._process)

    def close(self) -> None:
        os.close(self._process)


class CudaIpcOutlet:
    """The prefill end."""

    def __init__(self, sending: Sending) -> None:
        limits, connected = sending.limits, sending.connected
        heard = terms.hear(sending.sock, connected.incoming, limits.handshake_s)
        window = msgspec.msgpack.decode(heard, type=Window)
        self._pages = DevicePages(sending.memory)
        self._runtime: Any = cuda.library().cuda.runtime
        assert sending.memory.device is not None
        theirs = cuda.device_of(window.gpu)
        ours = sending.memory.device
        if ours != theirs and not self._runtime.deviceCanAccessPeer(ours, theirs):
            raise TransferError(f"GPU {ours} cannot reach the memory of GPU {theirs}")
        with torch.cuda.device(theirs):
            self._opened = self._runtime.ipcOpenMemHandle(window.handle, _LAZY_PEER_ACCESS)
        self._target = self._opened + window.offset
        self._target_blocks = connected.num_blocks
        # Where the model's first layer would lie, whether it is held here or not.
        skipped = sending.memory.first_layer * self._pages.geometry.layer_bytes
        self._source = sending.memory.address - skipped
        whole = sending.whole
        self._target_unit = whole.layer_block_bytes
        self._places = places_of(sending.share, whole)
        self._sock = sending.sock
        self._seal = connected.outgoing
        self._checksum = connected.checksum
        self._stall_s = limits.stall_s
        self.frame_bytes = limits.device_frame_bytes

    def after(self, ready: object) -> None:
        self._pages.after(ready)

    def write(
        self,
        generation: Generation,
        chunk: Chunk,
        source_blocks: Sequence[BlockId],
        target_blocks: Sequence[BlockId],
    ) -> None:
        check_blocks(target_blocks, self._target_blocks, side="granted")
        crc = self._pages.crc(self._checksum, chunk, source_blocks)
        for run in runs(source_blocks, target_blocks):
            if len(self._places) == 1:
                self._copy_run(chunk, run)
            else:
                self._copy_places(chunk, run)
        late = TransferTimeout(
            f"copies to the decode rank's GPU have not ended in {self._stall_s} s"
        )
        over = partial(self._pages.is_over, self._pages.mark())
        wait_until(over, self._sock, self._stall_s, late)
        length = self._pages.num_bytes(chunk)
        notice = Frame(Kind.CHUNK, generation, chunk, length, crc)
        send_all(self._sock, [encode(notice, self._seal)])

    def _copy_run(self, chunk: Chunk, run: Run) -> None:
        unit, pitch = self._target_unit, self._pages.geometry.layer_bytes
        target_pitch = self._target_blocks * unit
        self._copy(
            self._target + chunk.first_layer * target_pitch + run.target * unit,
            target_pitch,
            self._source + chunk.first_layer * pitch + run.source * unit,
            pitch,
            run.length * unit,
            chunk.num_layers,
        )

    def _copy_places(self, chunk: Chunk, run: Run) -> None:
        unit, target_unit = self._pages.geometry.unit, self._target_unit
        for layer in range(chunk.first_layer, chunk.first_layer + chunk.num_layers):
            here = self._source + layer * self._pages.geometry.layer_bytes + run.source * unit
            there = self._target + (layer * self._target_blocks + run.target) * target_unit
            for at, length in self._places:
                self._copy(there + at, target_unit, here, unit, length, run.length)
                here += length

    def _copy(  # noqa: PLR0917  the order of CUDA's own call
        self, target: int, target_pitch: int, source: int, pitch: int, width: int, height: int
    ) -> None:
        self._runtime.memcpy2DAsync(
            target,
            target_pitch,
            source,
            pitch,
            width,
            height,
            _DEVICE_TO_DEVICE,
            self._pages.stream.cuda_stream,
        )

    def probe(self, num_bytes: int) -> float:
        """Reads the decode rank's memory: only a granted page may be written."""
        here = self._pages.staging(num_bytes)
        stream = self._pages.stream
        seconds = 0.0
        for _ in range(2):  # the first one enables peer access
            begun, over = self._pages.mark(timed=True), self._pages.event(timed=True)
            self._runtime.memcpyAsync(
                here.data_ptr(), self._target, num_bytes, _DEVICE_TO_DEVICE, stream.cuda_stream
            )
            over.record(stream)
            late = TransferTimeout("a first copy from the decode rank's GPU has not ended")
            wait_until(partial(self._pages.is_over, over), self._sock, self._stall_s, late)
            seconds = begun.elapsed_time(over) / 1000
        return num_bytes / max(seconds, 1e-9)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Waits for the copies: as long as it has not returned, they are not known to be over."""
        self._pages.stream.synchronize()
        self._runtime.ipcCloseMemHandle(self._opened)


def process_of(sock: socket.socket) -> int:
    """A descriptor of the process at the other end of a Unix socket.

    Raises:
        TransferError: it cannot be watched, for instance from another container.
    """
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid = _CREDENTIALS.unpack(raw)[0]
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise TransferError(
            f"the prefill process cannot be watched from here ({error}): run both ends in one "
            "process namespace, or use nccl"
        ) from error


def wait_for_exit(process: int) -> None:
    """Return when the process has ended, and with it everything that the driver did for it."""
    poller = select.poll()
    poller.register(process, select.POLLIN)
    while not poller.poll():
        pass
