"""Peers of a KV transfer that a test can kill, stop or bend: processes, and a hand-made source."""

import contextlib
import multiprocessing
import queue
import socket
from collections.abc import Callable, Generator
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from kvtransfer import shm, tcp
from kvtransfer.carrier import Sending, Transport, TransportChoice
from kvtransfer.carriers import make_carriers
from kvtransfer.frames import FROM_SINK, HEADER_BYTES, Frame, Kind, decode, encode
from kvtransfer.handshake import Connected, connect
from kvtransfer.limits import TransferLimits
from kvtransfer.plan import Chunk
from kvtransfer.reports import encode_attempt
from kvtransfer.sink import make_sink
from kvtransfer.source import make_source
from protocol.errors import TransferError
from protocol.ids import BlockId, Generation, WorkerRef
from protocol.kv import Grant
from tests.support.transfers import LAYOUT, WAIT_S, Events, a_worker, patterned

NUM_BLOCKS = 32


@contextlib.contextmanager
def another_process(
    body: Callable[..., None], *args: object
) -> Generator[tuple[BaseProcess, Connection]]:
    """Run ``body(pipe, *args)`` in a new process; it is killed at the end, whatever it does."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=body, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join(WAIT_S)
        ours.close()


def answer(pipe: Connection) -> object:
    assert pipe.poll(WAIT_S), "the other process says nothing"
    return pipe.recv()


def prefill_process(pipe: Connection, transport: TransportChoice, grant: Grant, point: str) -> None:
    """Takes a push as far as ``point``, says so, and then does nothing more."""
    source = make_source(patterned(LAYOUT, NUM_BLOCKS), a_worker("prefill-9"), transport=transport)
    push = source.open(grant)
    blocks = [BlockId(block) for block in range(len(grant.block_ids))]
    if point == "half sent":
        push.send(range(1), 0, blocks)
    elif point == "all sent":
        push.send(range(LAYOUT.num_layers), 0, blocks)
    pipe.send("ready")
    pipe.recv()


def decode_process(pipe: Connection, worker: WorkerRef, transport: Transport) -> None:
    """A decode rank that expects the grants it is sent, until it is killed."""
    memory = patterned(LAYOUT, NUM_BLOCKS)
    sink = make_sink(memory, worker, Events(), transport=transport)
    pipe.send(sink.endpoint)
    while True:
        sink.expect(pipe.recv())
        pipe.send("expected")


class HandMadeSource:
    """A source that has shaken hands and may then send whatever a test makes up."""

    def __init__(
        self,
        transport: Transport,
        decode: WorkerRef,
        address: str,
        cluster_key: bytes | None = None,
        *,
        damaged: bool = False,
    ) -> None:
        self._damaged = damaged
        self._carrier = make_carriers()[transport]
        self._memory = patterned(LAYOUT, NUM_BLOCKS, 9)
        worker = a_worker("prefill-8")
        self._carrier.prepare(self._memory, worker)
        self.sock = dial(transport, address)
        self.connected: Connected = connect(
            self.sock,
            source=worker,
            decode=decode,
            layout_digest=LAYOUT.digest(),
            cluster_key=cluster_key,
            timeout_s=WAIT_S,
        )
        self._outlet = self._carrier.outlet(
            Sending(
                sock=self.sock,
                memory=self._memory,
                worker=worker,
                connected=replace(self.connected, checksum="off") if damaged else self.connected,
                whole=LAYOUT,
                limits=TransferLimits(),
            )
        )
        self.sock.settimeout(WAIT_S)

    def send(self, frame: Frame, payload: bytes = b"", body: bytes = b"") -> None:
        self.sock.sendall(encode(frame, self.connected.outgoing, payload) + body)

    def open(self, grant: Grant) -> None:
        payload = encode_attempt(grant.ref)
        self.send(Frame(Kind.OPEN, grant.generation, length=len(payload)), payload)

    def chunk(self, generation: Generation, chunk: Chunk) -> None:
        """A chunk, with a wrong checksum if it is to be damaged. One that would be written straight
        into the pages is announced only.
        """
        length = chunk.num_layers * chunk.num_blocks * LAYOUT.layer_block_bytes
        if self._carrier.fence == "one_sided":
            self.send(Frame(Kind.CHUNK, generation, chunk, length))
            return
        if self._damaged and (self._carrier.name, self.connected.checksum) == ("tcp", "full"):
            self.send(Frame(Kind.CHUNK, generation, chunk, length), body=bytes(length))
            self.send(Frame(Kind.CHECK, generation, crc=1))
            return
        blocks = [BlockId(block) for block in range(chunk.num_blocks)]
        self._outlet.write(generation, chunk, blocks, blocks)

    def hear(self) -> Frame | None:
        """The next frame, without its payload; None where the sink has ended the connection."""
        header = self._exactly(HEADER_BYTES)
        if not header:
            return None
        frame = decode(header, FROM_SINK)
        self._exactly(frame.length)
        return frame

    def close(self) -> None:
        self.sock.close()
        self._outlet.close()
        self._carrier.close()

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part = self.sock.recv(size - len(data))
            except ConnectionResetError:
                return b""
            if not part:
                return b""
            data += part
        return data


def dial(transport: Transport, address: str) -> socket.socket:
    if make_carriers()[transport].control == "unix":
        return shm.connect(address, WAIT_S)
    return tcp.connect(address, WAIT_S, TransferLimits().socket_buffer_bytes)


class Done:
    """The callbacks of one push, to be waited for."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[TransferError | None] = queue.SimpleQueue()

    def __call__(self, error: TransferError | None = None) -> None:
        self._queue.put(error)

    def wait(self) -> TransferError | None:
        error = self._queue.get(timeout=WAIT_S)
        assert self._queue.empty(), "on_done was called twice"
        return error
