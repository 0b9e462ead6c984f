"""The other end of the KV benchmarks: a process with sinks, and how this one talks to it.

Grants are made here and expected there, as a gateway would see to it. The other process also reads
a bare socket into the same memory, for comparison.
"""

import multiprocessing
import queue
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

from kvtransfer import tcp
from kvtransfer.carrier import TransportChoice
from kvtransfer.checksum import ChecksumChoice, crc32_of
from kvtransfer.interface import Push, SinkEvent
from kvtransfer.limits import TransferLimits
from kvtransfer.memory import allocate_shared, buffer
from kvtransfer.plan import Chunk, Geometry
from kvtransfer.sink import Sink, make_sink
from protocol.errors import TransferError
from protocol.ids import (
    AttemptRef,
    BlockId,
    Generation,
    WorkerId,
    WorkerRef,
    new_incarnation,
    new_request_id,
)
from protocol.kv import Grant, KVEndpoint, KVLayout

WAIT_S = 60.0
SOCKET_BUFFER_BYTES = TransferLimits().socket_buffer_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """One memory of the other process, and its sinks by name: what each listens on and checks."""

    layout: KVLayout
    num_blocks: int
    sinks: Mapping[str, tuple[TransportChoice, ChecksumChoice]]


class DecodeRank:
    """The other process, as this one sees it."""

    def __init__(self, pipe: Connection, pools: Mapping[str, Pool]) -> None:
        self._pipe = pipe
        self._pools = pools
        self._endpoints: dict[str, KVEndpoint]
        self._refs: dict[str, WorkerRef]
        self._endpoints, self._refs, port = pipe.recv()
        self._pool_of = {sink: name for name, pool in pools.items() for sink in pool.sinks}
        self.bare = tcp.connect(f"127.0.0.1:{port}", WAIT_S, SOCKET_BUFFER_BYTES)
        self.bare.settimeout(None)
        self._generation = 0

    def grant(self, sink: str, blocks: Sequence[BlockId]) -> Grant:
        """A grant that the sink expects already."""
        self._generation += 1
        grant = Grant(
            ref=AttemptRef(new_request_id(), 0),
            decode=self._refs[sink],
            generation=Generation(self._generation),
            block_ids=tuple(blocks),
            layout_digest=self._pools[self._pool_of[sink]].layout.digest(),
            endpoint=self._endpoints[sink],
            lease_s=WAIT_S,
        )
        self._ask(("expect", sink, grant))
        return grant

    def receive_bare(self, offset: int, total: int, size: int) -> None:
        self._ask(("socket", offset, total, size))

    def crc(self, pool: str, blocks: Sequence[BlockId]) -> object:
        """Of the blocks' bytes, all layers, as they are there."""
        return self._ask(("crc", pool, tuple(blocks)))

    def _ask(self, request: tuple[object, ...]) -> object:
        self._pipe.send(request)
        if not self._pipe.poll(WAIT_S):
            raise TimeoutError("the decode process of the benchmark does not answer")
        return self._pipe.recv()


@contextmanager
def decode_rank(pools: Mapping[str, Pool], bare_pool: str) -> Iterator[DecodeRank]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_serve, args=(theirs, pools, bare_pool), daemon=True)
    child.start()
    theirs.close()
    try:
        yield DecodeRank(ours, pools)
    finally:
        ours.close()
        child.join(WAIT_S)
        child.kill()


def finish(push: Push) -> None:
    """End a push and wait until the decode rank has committed."""
    done: queue.SimpleQueue[TransferError | None] = queue.SimpleQueue()
    push.finish(b"", done.put)
    error = done.get(timeout=WAIT_S)
    if error is not None:
        raise error


def crc_of_blocks(view: memoryview, layout: KVLayout, blocks: Sequence[BlockId]) -> int:
    whole = Chunk(0, layout.num_layers, 0, len(blocks))
    places = Geometry(layout, len(view) // layout.block_bytes).extents(whole, blocks)
    return crc32_of(view, places)


def _serve(pipe: Connection, pools: Mapping[str, Pool], bare_pool: str) -> None:
    memories = {name: allocate_shared(pool.layout, pool.num_blocks) for name, pool in pools.items()}
    sinks: dict[str, Sink] = {}
    for name, pool in pools.items():
        for sink, (transport, checksum) in pool.sinks.items():
            ref = WorkerRef(WorkerId(f"decode-{sink}"), new_incarnation())
            sinks[sink] = make_sink(
                memories[name], ref, _forget, transport=transport, checksum=checksum
            )
    listener = tcp.listen("127.0.0.1", 0, SOCKET_BUFFER_BYTES)
    refs = {name: sink.worker for name, sink in sinks.items()}
    endpoints = {name: sink.endpoint for name, sink in sinks.items()}
    pipe.send((endpoints, refs, listener.getsockname()[1]))
    bare, _ = listener.accept()
    view = buffer(memories[bare_pool])
    try:
        while True:
            request = pipe.recv()
            if request[0] == "socket":
                pipe.send(None)
                _receive_bare(bare, view, *request[1:])
            elif request[0] == "crc":
                name, blocks = request[1:]
                pipe.send(crc_of_blocks(buffer(memories[name]), pools[name].layout, blocks))
            else:
                sinks[request[1]].expect(request[2])
                pipe.send(None)
    except EOFError:
        for open_sink in sinks.values():
            open_sink.close()


def _forget(_: SinkEvent) -> None:
    """The prefill side takes the time."""


def _receive_bare(
    bare: socket.socket, view: memoryview, offset: int, total: int, size: int
) -> None:
    for at in range(offset, offset + total, size):
        got = 0
        while got < size:
            got += bare.recv_into(view[at + got : at + size], 0, socket.MSG_WAITALL)
    bare.sendall(b"!")
