"""What any two-sided transport keeps: order, one receive for each header, no endless wait."""

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from kvtransfer.frames import FROM_SOURCE, HEADER_BYTES, Frame, Kind, Seal, decode
from kvtransfer.plan import Chunk
from kvtransfer.two_sided import TwoSidedInlet, TwoSidedOutlet
from protocol.errors import TransferTimeout
from protocol.ids import BlockId, Generation
from tests.support.transfers import LAYOUT, WAIT_S, block_bytes, patterned
from tests.support.two_sided import SocketCommunicator, StagedHostPages

FRAME_BYTES = 8 * LAYOUT.block_bytes
WHOLE = Chunk(0, LAYOUT.num_layers, 0, 2)
BRIEF_S = 0.1


class Ends:
    """A prefill and a decode end, with a control socket and a communicator between them."""

    def __init__(self, stall_s: float = WAIT_S) -> None:
        self.source_control, self.sink_control = socket.socketpair()
        self.sink_control.settimeout(WAIT_S)
        ours, theirs = socket.socketpair()
        self.sender, self.receiver = SocketCommunicator(ours), SocketCommunicator(theirs)
        self.source, self.target = patterned(LAYOUT, 8, 1), patterned(LAYOUT, 8, 2)
        self.pages = StagedHostPages(self.source)
        self.outlet = TwoSidedOutlet(
            self.source_control,
            self.pages,
            self.sender,
            checksum="sampled",
            seal=Seal(None),
            stall_s=stall_s,
            frame_bytes=FRAME_BYTES,
        )
        self.inlet = TwoSidedInlet(
            self.sink_control,
            StagedHostPages(self.target),
            self.receiver,
            checksum="sampled",
            stall_s=stall_s,
            max_bytes=FRAME_BYTES,
        )

    def header(self) -> Frame:
        data = self.sink_control.recv(HEADER_BYTES, socket.MSG_WAITALL)
        return decode(data, FROM_SOURCE)

    def close(self) -> None:
        self.outlet.close()
        self.inlet.close()
        self.source_control.close()
        self.sink_control.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    both = Ends()
    yield both
    both.close()


def in_background(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def blocks(*numbers: int) -> list[BlockId]:
    return [BlockId(number) for number in numbers]


def test_scattered_blocks_arrive_in_the_order_in_which_they_were_posted(ends: Ends) -> None:
    def write() -> None:
        for here in ([5, 1], [0, 7], [2, 3]):
            ends.outlet.write(Generation(1), WHOLE, blocks(*here), [])

    writer = in_background(write)
    for there in ([6, 2], [1, 0], [4, 7]):
        frame = ends.header()
        assert frame.chunk == WHOLE
        assert ends.inlet.receive(WHOLE, blocks(*there), lambda: True)
        assert ends.inlet.is_intact(frame.crc, WHOLE, blocks(*there))
    writer.join(WAIT_S)
    pairs = [(5, 6), (1, 2), (0, 1), (7, 0), (2, 4), (3, 7)]
    for sent, arrived in pairs:
        assert block_bytes(ends.source, sent) == block_bytes(ends.target, arrived)


def test_what_is_thrown_away_still_meets_its_receive(ends: Ends) -> None:
    def write() -> None:
        for _ in range(3):
            ends.outlet.write(Generation(1), WHOLE, blocks(3, 4), [])
        ends.outlet.probe(100)
        ends.outlet.write(Generation(2), WHOLE, blocks(5, 6), [])

    before = [block_bytes(ends.target, block) for block in range(8)]
    writer = in_background(write)
    ends.inlet.discard(ends.header().length)
    ends.header()
    assert not ends.inlet.receive(WHOLE, blocks(0, 1), lambda: False)
    ends.inlet.discard(ends.header().length)
    probe = ends.header()
    assert (probe.kind, probe.length) == (Kind.PROBE, 100)
    ends.inlet.discard(probe.length)
    assert [block_bytes(ends.target, block) for block in range(8)] == before
    assert ends.header().generation == 2
    assert ends.inlet.receive(WHOLE, blocks(0, 1), lambda: True)
    writer.join(WAIT_S)
    assert block_bytes(ends.target, 0) == block_bytes(ends.source, 5)


def test_a_write_waits_for_the_engines_event(ends: Ends) -> None:
    event = object()
    ends.outlet.after(event)
    assert ends.pages.events == [event]


def test_a_receiver_that_never_posts_ends_the_send_and_its_communicator() -> None:
    ends = Ends(stall_s=BRIEF_S)
    big = Chunk(0, LAYOUT.num_layers, 0, 8)

    def write_until_the_buffers_are_full() -> None:
        while True:
            ends.outlet.write(Generation(1), big, blocks(*range(8)), [])

    def read_to_the_end() -> None:
        row = memoryview(bytearray(1 << 16))
        while True:
            done = ends.receiver.post_receive(row, len(row))
            while not done():
                pass

    with pytest.raises(TransferTimeout, match="taken nothing"):
        write_until_the_buffers_are_full()
    assert ends.sender.aborted
    with pytest.raises(ConnectionResetError):  # the abort has freed the other rank too
        read_to_the_end()
    ends.close()


def test_a_sender_that_never_posts_ends_the_receive_and_its_communicator() -> None:
    ends = Ends(stall_s=BRIEF_S)
    before = block_bytes(ends.target, 0)
    with pytest.raises(TimeoutError, match="stopped inside a chunk"):
        ends.inlet.receive(WHOLE, blocks(0, 1), lambda: True)
    assert ends.receiver.aborted
    assert block_bytes(ends.target, 0) == before
    ends.close()


def test_a_peer_that_goes_frees_the_receive_at_once(ends: Ends) -> None:
    failures: list[BaseException] = []

    def receive() -> None:
        try:
            ends.inlet.receive(WHOLE, blocks(0, 1), lambda: True)
        except OSError as error:
            failures.append(error)

    receiver = in_background(receive)
    ends.source_control.close()
    receiver.join(WAIT_S)
    assert len(failures) == 1
    assert ends.receiver.aborted


def test_a_chunk_beyond_the_staging_is_refused_before_anything_is_posted(ends: Ends) -> None:
    with pytest.raises(OSError, match="staging"):
        ends.inlet.discard(FRAME_BYTES + 1)
