"""A channel shares one connection among its pushes, a frame at a time."""

import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvtransfer.channel import Channel, Line
from kvtransfer.choice import Route
from kvtransfer.frames import FROM_SOURCE, HEADER_BYTES, Frame, Kind, Seal, control, decode
from kvtransfer.limits import TransferLimits
from kvtransfer.links import Link
from kvtransfer.outlet import Outlet
from kvtransfer.plan import Chunk
from kvtransfer.pushing import Finish, Pushing, Send
from protocol.ids import BlockId, Generation, WorkerId
from tests.support.transfer_peers import Done
from tests.support.transfers import LAYOUT, WAIT_S, a_grant, a_worker

BLOCKS = 16


@dataclass
class GatedOutlet:
    """Takes a frame of one block of one layer at a time, the first when the gate is opened."""

    gate: threading.Event = field(default_factory=threading.Event)
    written: list[Generation] = field(default_factory=list)
    frame_bytes: int = LAYOUT.layer_block_bytes

    def after(self, ready: object) -> None: ...

    def write(
        self,
        generation: Generation,
        chunk: Chunk,
        source_blocks: Sequence[BlockId],
        target_blocks: Sequence[BlockId],
    ) -> None:
        assert self.gate.wait(WAIT_S)
        assert (chunk.num_layers, chunk.num_blocks) == (1, 1)
        self.written.append(generation)

    def probe(self, num_bytes: int) -> float:
        return 1e9

    def flush(self) -> None: ...

    def close(self) -> None: ...


@dataclass
class RecordingOutlet:
    """Takes frames of any size."""

    written: list[tuple[Chunk, tuple[BlockId, ...]]] = field(default_factory=list)
    frame_bytes: int = 1 << 20

    def after(self, ready: object) -> None: ...

    def write(
        self,
        generation: Generation,
        chunk: Chunk,
        source_blocks: Sequence[BlockId],
        target_blocks: Sequence[BlockId],
    ) -> None:
        self.written.append((chunk, tuple(source_blocks)))

    def probe(self, num_bytes: int) -> float:
        return 1e12

    def flush(self) -> None: ...

    def close(self) -> None: ...


def a_channel(ours: socket.socket, outlet: Outlet) -> Channel:
    line = Line(
        sock=ours,
        outlet=outlet,
        fence="receiver_checked",
        route=Route("tcp", "", "same host", "test"),
        incoming=Seal(None),
        outgoing=Seal(None),
    )
    return Channel(
        layout=LAYOUT,
        pool_bytes=1 << 20,
        dial=lambda: line,
        limits=TransferLimits(),
        link=Link(WorkerId("prefill-0"), WorkerId("decode-0/0")),
        name="test",
        on_ended=lambda _: None,
    )


def hear(theirs: socket.socket) -> Frame:
    frame = decode(theirs.recv(HEADER_BYTES, socket.MSG_WAITALL), FROM_SOURCE)
    if frame.length:
        theirs.recv(frame.length, socket.MSG_WAITALL)
    return frame


def test_a_small_push_takes_turns_with_a_huge_one() -> None:
    ours, theirs = socket.socketpair()
    theirs.settimeout(WAIT_S)
    outlet = GatedOutlet()
    channel = a_channel(ours, outlet)
    decode_rank = a_worker()
    pushes = [
        Pushing(grant=a_grant(decode_rank, range(BLOCKS), generation=generation))
        for generation in (1, 2)
    ]
    done = [Done(), Done()]
    for push in pushes:
        channel.open(push)
        assert hear(theirs).kind is Kind.OPEN
        theirs.sendall(control(Kind.OPENED, push.grant.generation, Seal(None)))
    deadline = time.monotonic() + WAIT_S
    while any(push.state != "open" for push in pushes):
        assert time.monotonic() < deadline, "the channel does not heed the decode rank"
        time.sleep(0.001)
    for push, callback, blocks in zip(pushes, done, (BLOCKS, 1), strict=True):
        chunk = Chunk(0, LAYOUT.num_layers, 0, blocks)
        channel.submit(push, Send(chunk, tuple(BlockId(block) for block in range(blocks))))
        channel.submit(push, Finish(b"", callback))
    outlet.gate.set()
    finished = [hear(theirs) for _ in "12"]
    assert [frame.generation for frame in finished] == [2, 1]
    for frame in finished:
        theirs.sendall(control(Kind.COMMITTED, frame.generation, Seal(None)))
    assert [callback.wait() for callback in done] == [None, None]
    assert len(outlet.written) == LAYOUT.num_layers * (BLOCKS + 1)
    channel.close()
    channel.join(WAIT_S)
    theirs.close()


def test_groups_of_layers_of_neighbouring_blocks_leave_as_one_frame() -> None:
    ours, theirs = socket.socketpair()
    theirs.settimeout(WAIT_S)
    outlet = RecordingOutlet()
    channel = a_channel(ours, outlet)
    push, done = Pushing(grant=a_grant(a_worker(), range(5))), Done()
    channel.open(push)
    assert hear(theirs).kind is Kind.OPEN
    blocks = [BlockId(block) for block in (7, 3, 4, 9, 1)]
    for first in range(4):  # by block, the first layer and then the others
        for layers in (range(1), range(1, LAYOUT.num_layers)):
            chunk = Chunk(layers.start, len(layers), first, 1)
            channel.submit(push, Send(chunk, (blocks[first],)))
    channel.submit(push, Send(Chunk(2, 1, 4, 1), (blocks[4],)))  # fits to nothing before it
    channel.submit(push, Send(Chunk(0, 1, 4, 1), (blocks[4],)))
    channel.submit(push, Finish(b"", done))
    theirs.sendall(control(Kind.OPENED, push.grant.generation, Seal(None)))
    assert hear(theirs).kind is Kind.FINISH
    assert outlet.written == [
        (Chunk(0, LAYOUT.num_layers, 0, 4), tuple(blocks[:4])),
        (Chunk(2, 1, 4, 1), (blocks[4],)),
        (Chunk(0, 1, 4, 1), (blocks[4],)),
    ]
    theirs.sendall(control(Kind.COMMITTED, push.grant.generation, Seal(None)))
    assert done.wait() is None
    channel.close()
    channel.join(WAIT_S)
    theirs.close()
