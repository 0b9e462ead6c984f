"""KV blocks from GPU to GPU by NCCL, over cupy: a communicator for each pair of ranks.

It is made when the pair's connection is, and lives as long: a restarted peer is another connection
and another communicator. The decode rank makes the id, which travels over the authenticated
connection. Sends and receives run on the pages' own stream (``kvtransfer.two_sided``).
"""

import importlib
import threading
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import msgspec
import torch
from torch import Tensor

from kvtransfer import cuda, terms
from kvtransfer.carrier import Receiving, Sending, Transport
from kvtransfer.cuda import DevicePages
from kvtransfer.interface import Fence, KVMemory
from kvtransfer.two_sided import TwoSidedInlet, TwoSidedOutlet
from protocol.errors import ConfigError, TransferError, TransferTimeout
from protocol.ids import WorkerRef

_DECODE, _PREFILL = 0, 1
_REFUSALS = (RuntimeError, KeyError)
"""What cupy raises: its own error is the former, and the latter for codes that it does not know."""


class Meeting(msgspec.Struct, frozen=True, kw_only=True):
    """What the decode rank says first."""

    id: tuple[int, ...]


class NcclCarrier:
    name: ClassVar[Transport] = "nccl"
    control: ClassVar[Literal["unix", "tcp"]] = "tcp"
    fence: ClassVar[Fence] = "receiver_checked"
    on_device: ClassVar[bool] = True

    def problem(self, memory: KVMemory) -> str | None:
        found = cuda.problem(memory)
        if found is None:
            try:
                _nccl()
            except ConfigError as error:
                return str(error)
        return found

    def prepare(self, memory: KVMemory, worker: WorkerRef) -> None:
        """Nothing is shared."""

    def outlet(self, sending: Sending) -> TwoSidedOutlet[Tensor]:
        pages, limits, connected = DevicePages(sending.memory), sending.limits, sending.connected
        heard = terms.hear(sending.sock, connected.incoming, limits.handshake_s)
        meeting = msgspec.msgpack.decode(heard, type=Meeting)
        return TwoSidedOutlet(
            sending.sock,
            pages,
            NcclPair(meeting.id, _PREFILL, pages, limits.meet_s),
            checksum=connected.checksum,
            seal=connected.outgoing,
            stall_s=limits.stall_s,
            frame_bytes=max(limits.device_frame_bytes, pages.geometry.unit),
        )

    def inlet(self, receiving: Receiving) -> TwoSidedInlet[Tensor]:
        pages, limits = DevicePages(receiving.memory, receiving.share), receiving.limits
        meeting = Meeting(id=tuple(_nccl().get_unique_id()))
        answer = msgspec.msgpack.encode(meeting)
        terms.tell(receiving.sock, receiving.admitted.outgoing, answer, limits.handshake_s)
        return TwoSidedInlet(
            receiving.sock,
            pages,
            NcclPair(meeting.id, _DECODE, pages, limits.meet_s),
            checksum=receiving.checksum,
            stall_s=limits.stall_s,
            max_bytes=max(limits.device_frame_bytes, pages.geometry.unit),
        )

    def close(self) -> None:
        """Nothing is shared."""


class NcclPair:
    """A ``Communicator``. Made by both ends at about the same time.

    Raises:
        TransferTimeout: the other end has not come. NCCL cannot be called back from waiting for it,
            so the thread that waits is left behind; it holds up nobody.
        TransferError: NCCL refuses.
    """

    def __init__(
        self, meeting: tuple[int, ...], rank: int, pages: DevicePages, meet_s: float
    ) -> None:
        self._nccl = _nccl()
        self._peer = 1 - rank
        self._pages = pages
        self._aborted = False
        met = threading.Event()
        found: list[Any] = []

        def meet() -> None:
            try:
                torch.cuda.set_device(pages.device)
                found.append(self._nccl.NcclCommunicator(2, meeting, rank))
            except _REFUSALS as error:
                found.append(error)
            met.set()

        threading.Thread(target=meet, name="kv-nccl-meet", daemon=True).start()
        if not met.wait(meet_s):
            raise TransferTimeout(f"the other end has not joined NCCL in {meet_s} s")
        if isinstance(found[0], Exception):
            raise TransferError(f"NCCL cannot connect the pair: {found[0]}")
        self._communicator = found[0]

    def post_send(self, row: Tensor, num_bytes: int) -> Callable[[], bool]:
        return self._post(self._communicator.send, row, num_bytes)

    def post_receive(self, row: Tensor, num_bytes: int) -> Callable[[], bool]:
        return self._post(self._communicator.recv, row, num_bytes)

    def queued(self) -> Callable[[], bool]:
        event = self._pages.mark()
        return lambda: self._over(event)

    def abort(self) -> None:
        if not self._aborted:
            self._aborted = True
            self._communicator.abort()

    def _post(self, operation: Any, row: Tensor, num_bytes: int) -> Callable[[], bool]:
        if self._aborted:
            raise ConnectionAbortedError("the pair's communicator has been aborted")
        if num_bytes:
            stream = self._pages.stream.cuda_stream
            try:
                self._nccl.groupStart()
                operation(row.data_ptr(), num_bytes, self._nccl.NCCL_UINT8, self._peer, stream)
                self._nccl.groupEnd()
            except _REFUSALS as error:
                raise ConnectionResetError(f"NCCL: {error}") from error
        return self.queued()

    def _over(self, event: torch.cuda.Event) -> bool:
        if self._pages.is_over(event):
            return True
        try:
            self._communicator.check_async_error()
        except _REFUSALS as error:
            raise ConnectionResetError(f"NCCL has lost the peer: {error}") from error
        return False


def _nccl() -> Any:
    cuda.library()
    try:
        nccl = importlib.import_module("cupy.cuda.nccl")
    except ImportError as error:
        raise ConfigError(
            f"cannot load NCCL through cupy: {error}; {cuda.HOW_TO_INSTALL}"
        ) from error
    if not nccl.available:
        raise ConfigError(f"cupy finds no NCCL; {cuda.HOW_TO_INSTALL}")
    return nccl
