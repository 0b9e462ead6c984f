"""A channel shares one connection among its pushes, a frame at a time."""

import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvtransfer.channel import Channel, Line
from kvtransfer.choice import Route
from kvtransfer.frames import FROM_SOURCE, HEADER_BYTES, Kind, Seal, control, decode
from kvtransfer.limits import TransferLimits
from kvtransfer.links import Link
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


def test_a_small_push_takes_turns_with_a_huge_one() -> None:
    ours, theirs = socket.socketpair()
    theirs.settimeout(WAIT_S)
    outlet = GatedOutlet()
    line = Line(
        sock=ours,
        outlet=outlet,
        fence="receiver_checked",
        route=Route("tcp", "", "same host", "test"),
        incoming=Seal(None),
        outgoing=Seal(None),
    )
    decode_rank = a_worker()
    channel = Channel(
        layout=LAYOUT,
        pool_bytes=1 << 20,
        dial=lambda: line,
        limits=TransferLimits(),
        link=Link(WorkerId("decode-0/0")),
        name="test",
        on_ended=lambda _: None,
    )
    pushes = [
        Pushing(grant=a_grant(decode_rank, range(BLOCKS), generation=generation))
        for generation in (1, 2)
    ]
    done = [Done(), Done()]
    for push in pushes:
        channel.open(push)
        frame = decode(theirs.recv(HEADER_BYTES, socket.MSG_WAITALL), FROM_SOURCE)
        assert frame.kind is Kind.OPEN
        theirs.recv(frame.length, socket.MSG_WAITALL)
        theirs.sendall(control(Kind.OPENED, push.grant.generation, Seal(None)))
    for push, callback, blocks in zip(pushes, done, (BLOCKS, 1), strict=True):
        chunk = Chunk(0, LAYOUT.num_layers, 0, blocks)
        channel.submit(push, Send(chunk, tuple(BlockId(block) for block in range(blocks))))
        channel.submit(push, Finish(b"", callback))
    outlet.gate.set()
    finished = [decode(theirs.recv(HEADER_BYTES, socket.MSG_WAITALL), FROM_SOURCE) for _ in "12"]
    assert [frame.generation for frame in finished] == [2, 1]
    for frame in finished:
        theirs.sendall(control(Kind.COMMITTED, frame.generation, Seal(None)))
    assert [callback.wait() for callback in done] == [None, None]
    assert len(outlet.written) == LAYOUT.num_layers * (BLOCKS + 1)
    channel.close()
    channel.join(WAIT_S)
    theirs.close()
