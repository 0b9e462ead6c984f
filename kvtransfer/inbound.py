"""One prefill worker's connection at the decode rank, served by a thread of its own.

The thread is the only reader of the socket, and on tcp the only writer of the granted pages, so
its end is the proof that nothing is written any more. On shm the other process writes, so there
the proof is the end of the stream as the peer makes it; this side never makes it itself.
"""

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Protocol

from kvtransfer import tcp
from kvtransfer.carrier import Carrier, Receiving
from kvtransfer.checksum import Checksum, ChecksumChoice
from kvtransfer.frames import FROM_SOURCE, Frame, Kind, Seal, check_tag, control, decode
from kvtransfer.handshake import Admitted, Payload, admit, is_one_machine
from kvtransfer.inlet import Inlet, Reader
from kvtransfer.interface import KVMemory
from kvtransfer.ledger import GrantLedger
from kvtransfer.limits import TransferLimits
from kvtransfer.plan import Chunk
from kvtransfer.reports import decode_attempt, decode_error, encode_error
from kvtransfer.shares import WHOLE
from kvtransfer.steps import ConnectionId, Notice, NoticeKind, Step
from protocol.errors import ProtocolError, ServingError, TransferError
from protocol.ids import BlockId, Generation, WorkerRef

MAX_CHUNK_BYTES = 16 * 1024 * 1024
_KINDS: dict[NoticeKind, Kind] = {
    "opened": Kind.OPENED,
    "refused": Kind.REFUSED,
    "committed": Kind.COMMITTED,
    "cancel": Kind.CANCEL,
    "probed": Kind.PROBED,
}


class LedgerOwner(Protocol):
    """What a connection needs of the sink that it belongs to. All calls are thread-safe."""

    @property
    def worker(self) -> WorkerRef: ...
    @property
    def cluster_key(self) -> bytes | None: ...
    @property
    def checksum(self) -> ChecksumChoice: ...
    @property
    def payload(self) -> Payload: ...
    @property
    def limits(self) -> TransferLimits: ...

    def apply(self, change: Callable[[GrantLedger], Step]) -> None: ...
    def begin_chunk(
        self, generation: Generation, chunk: Chunk, connection: ConnectionId
    ) -> tuple[BlockId, ...] | None: ...
    def may_copy(self, generation: Generation) -> bool: ...
    def refused(self, reason: str) -> None: ...
    def ended(self, connection: ConnectionId) -> None: ...


class Inbound:
    def __init__(
        self,
        sink: LedgerOwner,
        number: ConnectionId,
        *,
        carrier: Carrier,
        memory: KVMemory,
        sock: socket.socket,
    ) -> None:
        self.is_admitted = False
        self._sink = sink
        self._number = number
        self._carrier = carrier
        self._memory = memory
        self._share = WHOLE
        self._checksum: Checksum = "off"
        self._payload: Payload = sink.payload if carrier.name == "tcp" else "exact"
        self._sock = sock
        self._outgoing = Seal(None)
        self._thread = threading.Thread(target=self._run, name=f"kv-in-{number}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def notify(self, notice: Notice) -> None:
        """Say it at once or cut the connection: a peer that does not read is of no use. Called
        under the sink's lock, which keeps the frames in their sealed order.
        """
        payload = b"" if notice.error is None else encode_error(notice.error)
        frame = control(_KINDS[notice.kind], notice.generation, self._outgoing, payload)
        try:
            sent = self._sock.send(frame, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            sent = 0
        if sent < len(frame):
            self.close()

    def close(self) -> None:
        """Ask for the end. On shm only our half closes: the peer's half is its proof."""
        one_sided = self._carrier.fence == "one_sided"
        how = socket.SHUT_WR if one_sided and self.is_admitted else socket.SHUT_RDWR
        with contextlib.suppress(OSError):
            self._sock.shutdown(how)

    def _run(self) -> None:
        try:
            admitted = self._admit()
            if admitted is None:
                return
            reader = Reader(self._sock, self._sink.limits.stall_s)
            inlet = self._inlet(reader, admitted)
            if inlet is None:
                return
            try:
                self._serve_until_lost(reader, inlet, admitted)
            finally:
                inlet.close()
        finally:
            self._sink.ended(self._number)
            self._sock.close()

    def _admit(self) -> Admitted | None:
        sink, memory = self._sink, self._memory
        try:
            if self._carrier.control == "tcp":
                tcp.tune(self._sock, sink.limits.socket_buffer_bytes)
            self._checksum = _checksum(sink.checksum, self._sock)
            admitted = admit(
                self._sock,
                decode=sink.worker,
                layout=memory.layout,
                num_blocks=memory.num_blocks,
                checksum=self._checksum,
                payload=self._payload,
                cluster_key=sink.cluster_key,
                timeout_s=sink.limits.handshake_s,
            )
            self._outgoing, self._share = admitted.outgoing, admitted.share
            self.is_admitted = True
        except (ServingError, OSError) as error:
            sink.refused(str(error))
            return None
        return admitted

    def _inlet(self, reader: Reader, admitted: Admitted) -> Inlet | None:
        try:
            return self._carrier.inlet(
                Receiving(
                    sock=self._sock,
                    reader=reader,
                    memory=self._memory,
                    checksum=self._checksum,
                    payload=self._payload,
                    worker=self._sink.worker,
                    admitted=admitted,
                    limits=self._sink.limits,
                )
            )
        except (ServingError, OSError, ValueError, RuntimeError) as error:  # CUDA's are the last
            reason = f"no {self._carrier.name} from {admitted.source.worker_id}: {error}"
            self._sink.refused(reason)
            return None

    def _serve_until_lost(self, reader: Reader, inlet: Inlet, admitted: Admitted) -> None:
        stopped = False
        problem = f"the connection to {admitted.source.worker_id} has ended"
        try:
            stopped = self._serve(reader, inlet, admitted)
        except ProtocolError as error:
            problem = f"{admitted.source.worker_id} broke the KV protocol: {error}"
            self._sink.refused(problem)
        except (OSError, RuntimeError) as error:  # the latter from CUDA
            problem = f"the connection to {admitted.source.worker_id} was lost: {error}"
        lost = TransferError(problem)
        self.close()
        if self._carrier.fence == "one_sided":
            self._sink.apply(lambda ledger: ledger.connection_cut(self._number, lost))
            inlet.wait_until_quiet(stopped)
        self._sink.apply(lambda ledger: ledger.connection_lost(self._number, lost))

    def _serve(self, reader: Reader, inlet: Inlet, admitted: Admitted) -> bool:
        """True where the peer has said that it has stopped."""
        while (header := reader.header()) is not None:
            frame = decode(header, FROM_SOURCE)
            if frame.kind in {Kind.CHUNK, Kind.PROBE}:
                check_tag(header, b"", admitted.incoming)
                if frame.kind is Kind.CHUNK:
                    self._take_chunk(frame, inlet)
                else:
                    self._take_probe(frame, inlet)
                continue
            payload = reader.payload(frame.length)
            check_tag(header, payload, admitted.incoming)
            if frame.kind is Kind.STOPPED:
                return True
            self._sink.apply(self._control(frame, bytes(payload)))
        return False

    def _control(self, frame: Frame, payload: bytes) -> Callable[[GrantLedger], Step]:
        generation, number = frame.generation, self._number
        if frame.kind is Kind.OPEN:
            ref, carrier, share = decode_attempt(payload), self._carrier, self._share
            return lambda ledger: ledger.bind(
                generation,
                ref,
                connection=number,
                fence=carrier.fence,
                on_device=carrier.on_device,
                share=share,
            )
        if frame.kind is Kind.FINISH:
            return lambda ledger: ledger.finish(generation, payload, connection=number)
        error = decode_error(payload)
        return lambda ledger: ledger.source_stopped(generation, error, connection=number)

    def _take_probe(self, frame: Frame, inlet: Inlet) -> None:
        if frame.length > MAX_CHUNK_BYTES:
            raise ProtocolError("a probe is too long", bytes=frame.length, limit=MAX_CHUNK_BYTES)
        inlet.discard(frame.length)
        self._sink.apply(lambda ledger: ledger.probed(self._number))

    def _take_chunk(self, frame: Frame, inlet: Inlet) -> None:
        sink, number = self._sink, self._number
        generation, chunk = frame.generation, frame.chunk
        unit = self._memory.layout.layer_block_bytes // self._share.parts
        if frame.length != chunk.num_layers * chunk.num_blocks * unit:
            raise ProtocolError("a chunk's length is not that of its blocks", bytes=frame.length)
        if frame.length > max(MAX_CHUNK_BYTES, unit):
            raise ProtocolError("a chunk is too long", bytes=frame.length, limit=MAX_CHUNK_BYTES)
        blocks = sink.begin_chunk(generation, chunk, number)
        if blocks is None:
            inlet.discard(frame.length)
            return
        complete = inlet.receive(chunk, blocks, lambda: sink.may_copy(generation))
        intact = not complete or inlet.is_intact(frame.crc, chunk, blocks)
        sink.apply(
            lambda ledger: ledger.end_chunk(generation, chunk, intact=intact, connection=number)
        )


def _checksum(choice: ChecksumChoice, sock: socket.socket) -> Checksum:
    if choice != "auto":
        return choice
    return "sampled" if is_one_machine(sock) else "full"
