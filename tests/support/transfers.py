"""Builders for KV transfers: small layouts, patterned memory, grants, and a queue of events."""

import queue
import random
import time
from collections.abc import Callable, Sequence

from kvtransfer.interface import Committed, KVMemory, Quiet, SinkEvent, TransferFailed
from kvtransfer.memory import allocate_shared, buffer
from protocol.ids import (
    AttemptRef,
    BlockId,
    Generation,
    RequestId,
    WorkerId,
    WorkerRef,
    new_incarnation,
)
from protocol.kv import Grant, KVEndpoint, KVLayout

WAIT_S = 20.0
LAYOUT = KVLayout(
    kind="gqa",
    dtype="float32",
    num_layers=3,
    block_tokens=4,
    kv_heads=2,
    key_width=4,
    value_width=4,
)
NOWHERE = KVEndpoint(host_id="", num_blocks=0, addresses={})


def a_worker(name: str = "decode-0/0") -> WorkerRef:
    return WorkerRef(WorkerId(name), new_incarnation())


def a_grant(
    decode: WorkerRef,
    blocks: Sequence[int],
    *,
    generation: int = 1,
    endpoint: KVEndpoint = NOWHERE,
    layout: KVLayout = LAYOUT,
    request: str = "request",
    attempt: int = 0,
) -> Grant:
    return Grant(
        ref=AttemptRef(RequestId(request), attempt),
        decode=decode,
        generation=Generation(generation),
        block_ids=tuple(BlockId(block) for block in blocks),
        layout_digest=layout.digest(),
        endpoint=endpoint,
        lease_s=30.0,
    )


def patterned(layout: KVLayout, num_blocks: int, seed: int = 0) -> KVMemory:
    memory = allocate_shared(layout, num_blocks)
    view, dice = buffer(memory), random.Random(seed)
    for at in range(0, memory.num_bytes, 1 << 20):
        view[at : at + (1 << 20)] = dice.randbytes(min(1 << 20, memory.num_bytes - at))
    return memory


def block_bytes(memory: KVMemory, block: int) -> bytes:
    """One block's bytes, layer after layer."""
    unit, view = memory.layout.layer_block_bytes, buffer(memory)
    starts = (
        (layer * memory.num_blocks + block) * unit for layer in range(memory.layout.num_layers)
    )
    return b"".join(view[start : start + unit] for start in starts)


def until(condition: Callable[[], bool], what: str) -> None:
    """Return when the condition holds; ``what`` is the complaint where it never does."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


class Events:
    """What a sink has said, to be waited for one by one."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[SinkEvent] = queue.SimpleQueue()

    def __call__(self, event: SinkEvent) -> None:
        self._queue.put(event)

    def next(self) -> SinkEvent:
        return self._queue.get(timeout=WAIT_S)

    def committed(self) -> Committed:
        event = self.next()
        assert isinstance(event, Committed), event
        return event

    def failed(self) -> TransferFailed:
        event = self.next()
        assert isinstance(event, TransferFailed), event
        return event

    def quiet(self) -> Quiet:
        event = self.next()
        assert isinstance(event, Quiet), event
        return event

    def is_empty(self) -> bool:
        return self._queue.empty()
