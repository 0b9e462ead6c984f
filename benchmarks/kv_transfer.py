"""GB/s of KV transfers between two processes, against memcpy and a bare socket in the same run.

    python -m benchmarks.kv_transfer [--json] [--quick] [--no-model]

One repetition fills one grant and is timed from the first ``send`` to the peer's commit, so it
holds every copy, checksum, notice and thread change. ``send`` is called with pieces of the size in
the figure's name, as prefill does for each chunk and layer group. Grants alternate between the
halves of a pool much larger than the caches; memcpy copies the same bytes in the same pieces
between two pools of the same kind of memory, and the bare socket sends them in the same pieces,
with the same buffer sizes, to a reader that waits for whole pieces. Repetitions are interleaved and
medians reported. The ``_best`` ratios, which the bars use, compare the shortest repetitions: a
transfer needs two cores at once and memcpy one, so whatever else runs on a machine of two cores
lengthens the one more than the other.

``full`` reads every byte again for its checksum at both ends, ``sampled`` 4 KB of each layer of
each frame, ``off`` nothing. Within one machine, as here, ``sampled`` is the default, which the bars
use; between machines it is ``full``. NIXL is measured where it is installed. The share of a
prompt's transfer that computing does not hide needs the demo model (``benchmarks.kv_hidden``).
"""

import argparse
import ctypes
import random
import statistics
import sys
import time
from collections.abc import Callable

from benchmarks.kv_hidden import hidden_figures
from benchmarks.kv_peers import DecodeRank, Pool, crc_of_blocks, decode_rank, finish
from benchmarks.report import Bar, print_report
from kvtransfer.carrier import Transport, TransportChoice
from kvtransfer.carriers import make_carriers
from kvtransfer.checksum import Checksum, ChecksumChoice
from kvtransfer.interface import KVMemory
from kvtransfer.memory import allocate_shared, buffer
from kvtransfer.source import Source, make_source
from protocol.ids import BlockId, WorkerId, WorkerRef, new_incarnation
from protocol.kv import KVLayout

KB, MB = 1024, 1024 * 1024
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
SMALL_BLOCKS = 512  # as much as a probe of a link takes
CHECKSUMS: tuple[Checksum, ...] = ("full", "sampled", "off")
SHM_BAR, TCP_BAR, EXPOSED_BAR = 0.9, 0.9, 0.1
Case = Callable[[], float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout")
    parser.add_argument("--quick", action="store_true", help="grants of 16 MB, no prompt")
    parser.add_argument("--no-model", action="store_true", help="leave the prompt's transfer out")
    options = parser.parse_args()
    grant_bytes = 16 * MB if options.quick else 256 * MB
    figures = measure(grant_bytes, repetitions=5 if options.quick else 15)
    bars: list[Bar] = []
    for size in sizes(grant_bytes):
        if size >= MB:
            bars += speed_bars(figures, name(size))
    if not (options.quick or options.no_model):
        figures |= hidden_figures(repetitions=3)
        bars += [
            Bar(
                f"{transport}: share of a 4096-token prompt's transfer that is exposed",
                figures[f"{transport}_prompt_exposed_share"],
                at_most=EXPOSED_BAR,
            )
            for transport in ("shm", "tcp")
        ]
    return print_report("kv_transfer", figures, bars, only_json=options.json)


def sizes(grant_bytes: int) -> list[int]:
    return [size for size in (64 * KB, MB, 16 * MB, 256 * MB) if size <= grant_bytes]


def name(size: int) -> str:
    return f"{size // MB}MB" if size >= MB else f"{size // KB}KB"


def speed_bars(figures: dict[str, float], at: str) -> list[Bar]:
    return [
        Bar(
            f"shm over memcpy at {at}, best repetitions",
            figures[f"shm_sampled_{at}_of_memcpy_best"],
            at_least=SHM_BAR,
        ),
        Bar(
            f"tcp over a bare socket at {at}, best repetitions",
            figures[f"tcp_sampled_{at}_of_socket_best"],
            at_least=TCP_BAR,
        ),
    ]


def transports() -> list[Transport]:
    """What this machine can run between two processes on the host's memory."""
    nixl = make_carriers()["nixl"].problem(allocate_shared(SMALL, 1))
    return ["shm", "tcp"] if nixl is not None else ["shm", "tcp", "nixl"]


def measure(grant_bytes: int, repetitions: int) -> dict[str, float]:
    num_blocks = 2 * grant_bytes // LAYOUT.block_bytes
    found = transports()
    large: dict[str, tuple[TransportChoice, ChecksumChoice]] = {
        checksum: ("auto", checksum) for checksum in CHECKSUMS
    }
    small: dict[str, tuple[TransportChoice, ChecksumChoice]] = {"small": ("auto", "auto")}
    if "nixl" in found:
        large["nixl"], small["small-nixl"] = ("nixl", "auto"), ("nixl", "auto")
    pools = {
        "large": Pool(layout=LAYOUT, num_blocks=num_blocks, sinks=large),
        "small": Pool(layout=SMALL, num_blocks=SMALL_BLOCKS, sinks=small),
    }
    memory, elsewhere = allocate_shared(LAYOUT, num_blocks), allocate_shared(LAYOUT, num_blocks)
    for at in range(0, memory.num_bytes, MB):
        buffer(memory)[at : at + MB] = random.randbytes(MB)
    few = allocate_shared(SMALL, SMALL_BLOCKS)
    worker = WorkerRef(WorkerId("prefill-0"), new_incarnation())
    sources: list[Source] = []
    with decode_rank(pools, "large") as peer:
        try:
            pushes: dict[str, Pushes] = {}
            cases: dict[str, Case] = {}
            for transport in found:
                source = make_source(memory, worker, transport=transport)
                small_source = make_source(few, worker, transport=transport)
                sources += [source, small_source]
                if transport == "nixl":
                    pushes["nixl"] = Pushes(source, peer, "nixl", memory)
                    cases["nixl_4KB_us"] = latency_case(small_source, peer, "small-nixl")
                    continue
                for checksum in CHECKSUMS:
                    key = f"{transport}_{checksum}"
                    pushes[key] = Pushes(source, peer, checksum, memory)
                cases[f"{transport}_4KB_us"] = latency_case(small_source, peer, "small")
            for size in sizes(grant_bytes):  # what is compared runs side by side
                cases[f"memcpy_{name(size)}"] = memcpy_case(memory, elsewhere, grant_bytes, size)
                for key, of in pushes.items():
                    cases[f"{key}_{name(size)}"] = of.case(size, scattered=False)
                cases[f"socket_{name(size)}"] = socket_case(memory, peer, grant_bytes, size)
            for key, of in pushes.items():
                cases[f"{key}_1MB_scattered"] = of.case(MB, scattered=True)
            seconds = run(cases, repetitions)
            for of in pushes.values():
                of.check()
        finally:
            for source in sources:
                source.close()
    return summary(seconds, grant_bytes)


def run(cases: dict[str, Case], repetitions: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {key: [] for key in cases}
    for repetition in range(repetitions + 1):
        for key, case in cases.items():
            took = case()
            if repetition:  # the first one connects and warms up
                seconds[key].append(took)
    return seconds


def summary(seconds: dict[str, list[float]], grant_bytes: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    for key, times in seconds.items():
        median = statistics.median(times)
        figures[key] = round(median * 1e6 if key.endswith("_us") else grant_bytes / median / 1e9, 2)
    for size in sizes(grant_bytes):
        at = name(size)
        for transport, reference in (("shm", "memcpy"), ("tcp", "socket")):
            best = min(seconds[f"{reference}_{at}"])
            for checksum in CHECKSUMS:
                key = f"{transport}_{checksum}_{at}"
                figures[f"{key}_of_{reference}_best"] = round(best / min(seconds[key]), 3)
    return figures


class Pushes:
    """Whole pushes of half the pool to one sink."""

    def __init__(self, source: Source, peer: DecodeRank, sink: str, memory: KVMemory) -> None:
        self._source = source
        self._peer = peer
        self._sink = sink
        self._memory = memory
        self._half = 0
        self._last: tuple[list[BlockId], list[BlockId]] = ([], [])

    def case(self, size: int, *, scattered: bool) -> Case:
        """By sends of ``size``; pages in order or not."""
        per_send = max(1, size // LAYOUT.block_bytes)
        layers_per_send = LAYOUT.num_layers
        if size < LAYOUT.block_bytes:
            layers_per_send = size // LAYOUT.layer_block_bytes
        groups = [
            range(first, first + layers_per_send)
            for first in range(0, LAYOUT.num_layers, layers_per_send)
        ]

        def once() -> float:
            self._half = 1 - self._half
            count = self._memory.num_blocks // 2
            blocks = [BlockId(self._half * count + i) for i in range(count)]
            target = list(blocks)
            if scattered:
                random.shuffle(blocks)
                random.shuffle(target)
            self._last = blocks, target
            push = self._source.open(self._peer.grant(self._sink, target))
            started = time.perf_counter()
            for first in range(0, count, per_send):
                for layers in groups:
                    push.send(layers, first, blocks[first : first + per_send])
            finish(push)
            return time.perf_counter() - started

        return once

    def check(self) -> None:
        """One more push, of which the other side reads every byte."""
        self.case(MB, scattered=True)()
        source, target = self._last
        sent = crc_of_blocks(buffer(self._memory), LAYOUT, source)
        if self._peer.crc("large", target) != sent:
            raise AssertionError("the bytes at the decode rank are not those that were sent")


def memcpy_case(memory: KVMemory, elsewhere: KVMemory, grant_bytes: int, size: int) -> Case:
    offset = 0

    def once() -> float:
        nonlocal offset
        offset = grant_bytes - offset
        to, here = elsewhere.address + offset, memory.address + offset
        started = time.perf_counter()
        for at in range(0, grant_bytes, size):
            ctypes.memmove(to + at, here + at, size)
        return time.perf_counter() - started

    return once


def socket_case(memory: KVMemory, peer: DecodeRank, grant_bytes: int, size: int) -> Case:
    view, offset = buffer(memory), 0

    def once() -> float:
        nonlocal offset
        offset = grant_bytes - offset
        peer.receive_bare(offset, grant_bytes, size)
        started = time.perf_counter()
        for at in range(offset, offset + grant_bytes, size):
            peer.bare.sendall(view[at : at + size])
        peer.bare.recv(1)
        return time.perf_counter() - started

    return once


def latency_case(source: Source, peer: DecodeRank, sink: str) -> Case:
    """One whole transfer of a 4 KB grant: open, send, finish, committed. Mean of 50."""

    def once() -> float:
        grants = [peer.grant(sink, [BlockId(i % SMALL_BLOCKS)]) for i in range(50)]
        started = time.perf_counter()
        for grant in grants:
            push = source.open(grant)
            push.send(range(1), 0, [BlockId(0)])
            finish(push)
        return (time.perf_counter() - started) / len(grants)

    return once


if __name__ == "__main__":
    sys.exit(main())
