"""GB/s of KV transfers between two processes, against memcpy and a bare socket in the same run.

    python -m benchmarks.kv_transfer [--json] [--quick]

One repetition fills one grant and is timed from the first ``send`` to the peer's commit, so it
holds every copy, checksum, notice and thread change. ``send`` is called with pieces of the size in
the figure's name, as prefill does for each chunk and layer group. Grants alternate between the
halves of a pool much larger than the caches; memcpy copies the same bytes in the same pieces
between two pools of the same kind of memory, and the bare socket has the same buffer sizes.
Repetitions are interleaved and medians reported. The ``_best`` ratios, which the bars use, compare
the shortest repetitions: a transfer needs two cores at once and memcpy one, so whatever else runs
on a machine of two cores lengthens the one more than the other.
``full`` reads every byte again for its checksum at both ends, ``sampled`` 4 KB of each layer of
each frame, ``off`` nothing. The defaults are ``sampled`` for shm, which the bars use, and ``full``
for tcp.
"""

import argparse
import ctypes
import json
import multiprocessing
import queue
import random
import socket
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from kvtransfer import tcp
from kvtransfer.carrier import Transport
from kvtransfer.checksum import Checksum, crc32_of
from kvtransfer.interface import KVMemory, SinkEvent
from kvtransfer.limits import TransferLimits
from kvtransfer.memory import allocate_shared, buffer
from kvtransfer.plan import Chunk, Geometry
from kvtransfer.sink import Sink, make_sink
from kvtransfer.source import Source, make_source
from protocol.errors import TransferError
from protocol.ids import (
    AttemptRef,
    BlockId,
    Generation,
    RequestId,
    WorkerId,
    WorkerRef,
    new_incarnation,
    new_request_id,
)
from protocol.kv import Grant, KVLayout

KB, MB = 1024, 1024 * 1024
WAIT_S = 60.0
# Eight layers of 16 KB: 16 tokens, 2 heads of 128, keys and values, bfloat16.
LAYOUT = KVLayout(
    kind="gqa",
    dtype="bfloat16",
    num_layers=8,
    block_tokens=16,
    kv_heads=2,
    key_width=128,
    value_width=128,
)
SMALL = KVLayout(
    kind="gqa",
    dtype="bfloat16",
    num_layers=1,
    block_tokens=16,
    kv_heads=1,
    key_width=64,
    value_width=64,
)  # one block is 4 KB
TRANSPORTS: tuple[Transport, ...] = ("shm", "tcp")
SOCKET_BUFFER_BYTES = TransferLimits().socket_buffer_bytes
ALL_LAYERS = Chunk(0, LAYOUT.num_layers, 0, 0)
SHM_DEFAULT, SHM_LIMIT = "sampled", 0.8
CHECKSUMS: tuple[Checksum, ...] = ("full", "sampled", "off")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout")
    parser.add_argument("--quick", action="store_true", help="grants of 16 MB, fewer repetitions")
    options = parser.parse_args()
    grant_bytes = 16 * MB if options.quick else 128 * MB
    figures = measure(grant_bytes, repetitions=5 if options.quick else 15)
    bars = [bar(figures, size) for size in sizes(grant_bytes) if size >= MB]
    result = {"benchmark": "kv_transfer", "figures": figures, "bars": bars}
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        for key, value in figures.items():
            sys.stdout.write(f"{key:32} {value:8.2f}\n")
        for one in bars:
            sys.stdout.write(f"{'holds' if one['holds'] else 'FAILS'}  {one}\n")
    return 0 if all(one["holds"] for one in bars) else 1


def sizes(grant_bytes: int) -> list[int]:
    return [size for size in (64 * KB, MB, 16 * MB, 128 * MB) if size <= grant_bytes]


def name(size: int) -> str:
    return f"{size // MB}MB" if size >= MB else f"{size // KB}KB"


def bar(figures: dict[str, float], size: int) -> dict[str, object]:
    value = figures[f"shm_{SHM_DEFAULT}_{name(size)}_of_memcpy_best"]
    title = f"shm over memcpy at {name(size)}, best repetitions"
    return {"name": title, "value": value, "limit": SHM_LIMIT, "holds": value >= SHM_LIMIT}


def measure(grant_bytes: int, repetitions: int) -> dict[str, float]:
    num_blocks = 2 * grant_bytes // LAYOUT.block_bytes
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=decode_rank, args=(theirs, num_blocks), daemon=True)
    child.start()
    theirs.close()
    peer = DecodeRank(ours)
    memory, elsewhere = allocate_shared(LAYOUT, num_blocks), allocate_shared(LAYOUT, num_blocks)
    for at in range(0, memory.num_bytes, MB):
        buffer(memory)[at : at + MB] = random.randbytes(MB)
    small = allocate_shared(SMALL, 16)
    worker = WorkerRef(WorkerId("prefill-0"), new_incarnation())
    cases: dict[str, Callable[[], float]] = {}
    sources: list[Source] = []
    try:
        pushes = {}
        for transport in TRANSPORTS:
            source = make_source(memory, worker, transport=transport)
            small_source = make_source(small, worker, transport=transport)
            sources += [source, small_source]
            for checksum in CHECKSUMS:
                sink = f"large-{checksum}"
                pushes[f"{transport}_{checksum}"] = push_case(source, peer, sink, num_blocks)
            cases[f"{transport}_4KB_us"] = latency_case(small_source, peer)
        for size in sizes(grant_bytes):  # what is compared runs side by side
            cases[f"memcpy_{name(size)}"] = memcpy_case(memory, elsewhere, grant_bytes, size)
            for key, case in pushes.items():
                cases[f"{key}_{name(size)}"] = case(size, False)
            cases[f"socket_{name(size)}"] = socket_case(memory, peer, grant_bytes, size)
        for key, case in pushes.items():
            cases[f"{key}_1MB_scattered"] = case(MB, True)
        seconds: dict[str, list[float]] = {key: [] for key in cases}
        for repetition in range(repetitions + 1):
            for key, run in cases.items():
                took = run()
                if repetition:  # the first one connects and warms up
                    seconds[key].append(took)
        peer.check(buffer(memory))
    finally:
        for source in sources:
            source.close()
        ours.close()
        child.join(WAIT_S)
        child.kill()
    return summary(seconds, grant_bytes)


def summary(seconds: dict[str, list[float]], grant_bytes: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    for key, times in seconds.items():
        median = statistics.median(times)
        figures[key] = round(median * 1e6 if key.endswith("_us") else grant_bytes / median / 1e9, 2)
    for size in sizes(grant_bytes):
        at = name(size)
        figures[f"tcp_{at}_of_socket"] = round(
            figures[f"tcp_full_{at}"] / figures[f"socket_{at}"], 3
        )
        memcpy = min(seconds[f"memcpy_{at}"])
        for checksum in CHECKSUMS:
            ratio = round(memcpy / min(seconds[f"shm_{checksum}_{at}"]), 3)
            figures[f"shm_{checksum}_{at}_of_memcpy_best"] = ratio
    return figures


class DecodeRank:
    """The other process, as this one sees it."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._endpoints, port, self._ref = pipe.recv()
        self.bare = tcp.connect(f"127.0.0.1:{port}", WAIT_S, SOCKET_BUFFER_BYTES)
        self._generation = 0
        self._last: tuple[tuple[BlockId, ...], tuple[BlockId, ...]] | None = None

    def grant(self, sink: str, layout: KVLayout, blocks: tuple[BlockId, ...]) -> Grant:
        self._generation += 1
        grant = Grant(
            ref=AttemptRef(new_request_id(), 0),
            decode=self._ref[sink],
            generation=Generation(self._generation),
            block_ids=blocks,
            layout_digest=layout.digest(),
            endpoint=self._endpoints[sink],
            lease_s=WAIT_S,
        )
        self._pipe.send((sink, grant.ref.request_id, grant.generation, blocks))
        self._pipe.recv()
        return grant

    def receive_bare(self, offset: int, total: int, size: int) -> None:
        self._pipe.send(("socket", offset, total, size))
        self._pipe.recv()

    def sent(self, source: tuple[BlockId, ...], target: tuple[BlockId, ...]) -> None:
        self._last = source, target

    def check(self, view: memoryview) -> None:
        """The last grant's bytes have arrived: compared by checksum, read by the other side."""
        assert self._last is not None
        source, target = self._last
        self._pipe.send(("check", target))
        num_blocks = len(view) // LAYOUT.block_bytes
        places = Geometry(LAYOUT, num_blocks).extents(ALL_LAYERS, source)
        if self._pipe.recv() != crc32_of(view, places):
            raise AssertionError("the bytes at the decode rank are not those that were sent")


def decode_rank(pipe: Connection, num_blocks: int) -> None:
    memory, small = allocate_shared(LAYOUT, num_blocks), allocate_shared(SMALL, 16)
    sinks: dict[str, Sink] = {}
    refs: dict[str, WorkerRef] = {}
    for key, pool, checksum in (
        ("large-full", memory, "full"),
        ("large-sampled", memory, "sampled"),
        ("large-off", memory, "off"),
        ("small", small, "full"),
    ):
        refs[key] = WorkerRef(WorkerId(f"decode-{key}"), new_incarnation())
        sinks[key] = make_sink(pool, refs[key], _forget, checksum=checksum)  # type: ignore[arg-type]
    listener = tcp.listen("127.0.0.1", 0, SOCKET_BUFFER_BYTES)
    endpoints = {key: sink.endpoint for key, sink in sinks.items()}
    pipe.send((endpoints, listener.getsockname()[1], refs))
    bare, _ = listener.accept()
    view = buffer(memory)
    try:
        while True:
            request = pipe.recv()
            if request[0] == "socket":
                pipe.send(None)
                receive_bare(bare, view, *request[1:])
            elif request[0] == "check":
                places = Geometry(LAYOUT, num_blocks).extents(ALL_LAYERS, request[1])
                pipe.send(crc32_of(view, places))
            else:
                key, request_id, generation, blocks = request
                grant = Grant(
                    ref=AttemptRef(RequestId(request_id), 0),
                    decode=refs[key],
                    generation=generation,
                    block_ids=blocks,
                    layout_digest=sinks[key].memory.layout.digest(),
                    endpoint=endpoints[key],
                    lease_s=WAIT_S,
                )
                sinks[key].expect(grant)
                pipe.send(None)
    except EOFError:
        for sink in sinks.values():
            sink.close()


def _forget(_: SinkEvent) -> None:
    """The prefill side takes the time."""


def receive_bare(bare: socket.socket, view: memoryview, offset: int, total: int, size: int) -> None:
    for at in range(offset, offset + total, size):
        got = 0
        while got < size:
            got += bare.recv_into(view[at + got : at + size], 0, socket.MSG_WAITALL)
    bare.sendall(b"!")


def memcpy_case(
    memory: KVMemory, elsewhere: KVMemory, grant_bytes: int, size: int
) -> Callable[[], float]:
    offset = 0

    def run() -> float:
        nonlocal offset
        offset = grant_bytes - offset
        to, here = elsewhere.address + offset, memory.address + offset
        started = time.perf_counter()
        for at in range(0, grant_bytes, size):
            ctypes.memmove(to + at, here + at, size)
        return time.perf_counter() - started

    return run


def socket_case(
    memory: KVMemory, peer: DecodeRank, grant_bytes: int, size: int
) -> Callable[[], float]:
    view, offset = buffer(memory), 0

    def run() -> float:
        nonlocal offset
        offset = grant_bytes - offset
        peer.receive_bare(offset, grant_bytes, size)
        started = time.perf_counter()
        for at in range(offset, offset + grant_bytes, size):
            peer.bare.sendall(view[at : at + size])
        peer.bare.recv(1)
        return time.perf_counter() - started

    return run


def push_case(
    source: Source, peer: DecodeRank, sink: str, num_blocks: int
) -> Callable[[int, bool], Callable[[], float]]:
    """A maker of cases: pushes of half the pool by sends of ``size``, pages in order or not."""

    def case(size: int, scattered: bool) -> Callable[[], float]:
        half = 0
        per_send = max(1, size // LAYOUT.block_bytes)
        layers_per_send = LAYOUT.num_layers
        if size < LAYOUT.block_bytes:
            layers_per_send = size // LAYOUT.layer_block_bytes
        groups = [
            range(first, first + layers_per_send)
            for first in range(0, LAYOUT.num_layers, layers_per_send)
        ]

        def run() -> float:
            nonlocal half
            half = 1 - half
            blocks = [BlockId(half * num_blocks // 2 + i) for i in range(num_blocks // 2)]
            target = list(blocks)
            if scattered:
                random.shuffle(blocks)
                random.shuffle(target)
            grant = peer.grant(sink, LAYOUT, tuple(target))
            push = source.open(grant)
            done: queue.SimpleQueue[TransferError | None] = queue.SimpleQueue()
            started = time.perf_counter()
            for first in range(0, len(blocks), per_send):
                for layers in groups:
                    push.send(layers, first, blocks[first : first + per_send])
            push.finish(b"", done.put)
            error = done.get(timeout=WAIT_S)
            took = time.perf_counter() - started
            if error is not None:
                raise error
            peer.sent(tuple(blocks), tuple(target))
            return took

        return run

    return case


def latency_case(source: Source, peer: DecodeRank) -> Callable[[], float]:
    """One whole transfer of a 4 KB grant: open, send, finish, committed. Mean of 50."""

    def run() -> float:
        grants = [peer.grant("small", SMALL, (BlockId(i % 16),)) for i in range(50)]
        done: queue.SimpleQueue[TransferError | None] = queue.SimpleQueue()
        started = time.perf_counter()
        for grant in grants:
            push = source.open(grant)
            push.send(range(1), 0, [BlockId(0)])
            push.finish(b"", done.put)
            error = done.get(timeout=WAIT_S)
            if error is not None:
                raise error
        return (time.perf_counter() - started) / len(grants)

    return run


if __name__ == "__main__":
    sys.exit(main())
