"""What every KV transport does, whatever carries the bytes."""

import contextlib
import os
import random
import signal
import socket
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvtransfer import shm, terms
from kvtransfer.carrier import Receiving, Transport
from kvtransfer.carriers import make_carriers
from kvtransfer.checksum import ChecksumChoice
from kvtransfer.frames import Frame, Kind, control
from kvtransfer.handshake import admit, connect
from kvtransfer.inlet import Reader
from kvtransfer.interface import KVMemory, Push
from kvtransfer.limits import TransferLimits
from kvtransfer.memory import buffer
from kvtransfer.plan import Chunk
from kvtransfer.sink import Sink, make_sink
from kvtransfer.source import Source, make_source
from protocol.errors import LayoutMismatch, TransferCorrupt, TransferError, TransferTimeout
from protocol.ids import BlockId, Generation, WorkerRef
from protocol.kv import Grant, KVEndpoint, KVLayout
from tests.support.transfer_peers import (
    NUM_BLOCKS,
    Done,
    HandMadeSource,
    another_process,
    answer,
    decode_process,
    dial,
    prefill_process,
)
from tests.support.transfers import (
    LAYOUT,
    WAIT_S,
    Events,
    a_grant,
    a_worker,
    block_bytes,
    patterned,
    until,
)

KEY = b"the cluster's key, 32 bytes long"
BRIEF_S = 0.2
ALL = range(LAYOUT.num_layers)
PIECE = LAYOUT.layer_block_bytes


@dataclass
class Pair:
    """A prefill worker and a decode rank, their memory, and what the sink says."""

    transport: Transport
    decode: WorkerRef
    target: KVMemory
    memory: KVMemory
    events: Events
    sink: Sink
    source: Source
    generations: Iterator[int] = field(default_factory=lambda: iter(range(1, 1 << 30)))

    def grant(self, blocks: list[int]) -> Grant:
        grant = a_grant(
            self.decode,
            blocks,
            generation=next(self.generations),
            endpoint=self.sink.endpoint,
            layout=self.target.layout,
        )
        self.sink.expect(grant)
        return grant

    def carry(self, source_blocks: list[int], target_blocks: list[int]) -> None:
        """One whole transfer, with the bytes compared."""
        push, done = self.source.open(self.grant(target_blocks)), Done()
        send(push, range(self.memory.layout.num_layers), 0, source_blocks)
        push.finish(b"payload", done)
        committed = self.events.committed()
        assert done.wait() is None
        assert committed.payload == b"payload"
        assert committed.bytes_received == len(target_blocks) * self.target.layout.block_bytes
        for here, there in zip(source_blocks, target_blocks, strict=True):
            assert block_bytes(self.memory, here) == block_bytes(self.target, there)


@contextlib.contextmanager
def a_pair(
    transport: Transport,
    *,
    layout: KVLayout = LAYOUT,
    num_blocks: int = NUM_BLOCKS,
    cluster_key: bytes | None = None,
    checksum: ChecksumChoice = "auto",
    limits: TransferLimits | None = None,
) -> Generator[Pair]:
    decode, events = a_worker(), Events()
    target, memory = patterned(layout, num_blocks, 1), patterned(layout, num_blocks + 3, 2)
    sink = make_sink(
        target,
        decode,
        events,
        transport=transport,
        cluster_key=cluster_key,
        checksum=checksum,
        limits=limits,
    )
    source = make_source(
        memory, a_worker("prefill-0"), transport=transport, cluster_key=cluster_key, limits=limits
    )
    try:
        yield Pair(transport, decode, target, memory, events, sink, source)
    finally:
        source.close()
        sink.close()


@pytest.fixture
def pair(transport: Transport) -> Generator[Pair]:
    with a_pair(transport) as both:
        yield both


def send(push: Push, layers: range, first_block: int, blocks: list[int]) -> None:
    push.send(layers, first_block, [BlockId(block) for block in blocks])


def stop(pid: int) -> None:
    """Stop a process, and return when each of its threads has stopped."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    until(
        lambda: all(
            (task / "stat").read_text().rpartition(")")[2].split()[0] == "T"
            for task in tasks.iterdir()
        ),
        "the process goes on",
    )


def refusal(push: Push) -> TransferError:
    done = Done()
    push.finish(b"", done)
    error = done.wait()
    assert error is not None
    return error


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (list(range(8)), list(range(8, 16))),
        ([9, 1, 33, 4, 5, 6], [0, 31, 2, 20, 21, 5]),
        ([3], [30]),
        ([], []),
        (list(range(32)), list(range(32))),
    ],
    ids=["in order", "scattered", "one block", "no block", "the whole pool"],
)
def test_blocks_arrive_where_they_were_granted(
    pair: Pair, source: list[int], target: list[int]
) -> None:
    before = [block_bytes(pair.target, block) for block in range(NUM_BLOCKS)]
    pair.carry(source, target)
    for block in set(range(NUM_BLOCKS)) - set(target):
        assert block_bytes(pair.target, block) == before[block]


def test_sixty_four_megabytes_arrive(transport: Transport) -> None:
    layout = KVLayout(
        kind="gqa",
        dtype="float32",
        num_layers=4,
        block_tokens=16,
        kv_heads=8,
        key_width=128,
        value_width=128,
    )
    with a_pair(transport, layout=layout, num_blocks=128) as pair:
        blocks = list(range(128))
        pair.carry(blocks, random.Random(5).sample(blocks, 128))


def test_chunks_and_layer_groups_may_come_in_any_order(pair: Pair) -> None:
    push, done = pair.source.open(pair.grant([4, 9, 2, 3])), Done()
    for layers, first, blocks in (
        (range(2, 3), 2, [12, 13]),
        (range(2), 0, [10, 11]),
        (range(2), 2, [12, 13]),
        (range(2, 3), 0, [10, 11]),
    ):
        send(push, layers, first, blocks)
    push.finish(b"", done)
    pair.events.committed()
    assert done.wait() is None
    for here, there in zip([10, 11, 12, 13], [4, 9, 2, 3], strict=True):
        assert block_bytes(pair.memory, here) == block_bytes(pair.target, there)


def test_sixty_four_transfers_at_once_do_not_mix(transport: Transport) -> None:
    with a_pair(transport, num_blocks=128) as pair:
        pushes = [pair.source.open(pair.grant([2 * i, 2 * i + 1])) for i in range(64)]
        done = [Done() for _ in pushes]
        for layer in ALL:
            for i, push in enumerate(pushes):
                send(push, range(layer, layer + 1), 0, [2 * i + 1, 2 * i])
        for push, callback in zip(pushes, done, strict=True):
            push.finish(b"", callback)
        for callback in done:
            pair.events.committed()
            assert callback.wait() is None
        for i in range(64):
            assert block_bytes(pair.target, 2 * i) == block_bytes(pair.memory, 2 * i + 1)
            assert block_bytes(pair.target, 2 * i + 1) == block_bytes(pair.memory, 2 * i)


@pytest.mark.slow
def test_a_gigabyte_arrives(transport: Transport) -> None:
    layout = KVLayout(
        kind="gqa",
        dtype="bfloat16",
        num_layers=64,
        block_tokens=16,
        kv_heads=8,
        key_width=128,
        value_width=128,
    )
    num_blocks = (1 << 30) // layout.block_bytes
    with a_pair(transport, layout=layout, num_blocks=num_blocks) as pair:
        blocks = list(range(num_blocks))
        pair.carry(blocks, random.Random(6).sample(blocks, num_blocks))


def resources() -> tuple[int, int, int]:
    """(descriptors, threads, resident megabytes) of this process."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return len(os.listdir("/proc/self/fd")), threading.active_count(), resident >> 20


@pytest.mark.slow
def test_ten_thousand_transfers_leave_nothing_behind(pair: Pair) -> None:
    for i in range(1000):
        pair.carry([i % 32], [(7 * i) % 32])
    descriptors, threads, resident = resources()
    for i in range(9000):
        pair.carry([i % 32], [(7 * i) % 32])
    assert resources()[:2] == (descriptors, threads)
    assert resources()[2] <= resident + 8
    assert pair.sink.stats()["live_grants"] == 0


def test_three_hundred_transfers_leave_nothing_open(pair: Pair) -> None:
    pair.carry([0], [0])
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for i in range(300):
        pair.carry([i % 32], [(7 * i) % 32])
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert pair.sink.stats()["live_grants"] == 0


def test_closing_both_ends_leaves_nothing_open(transport: Transport) -> None:
    with a_pair(transport) as pair:
        pair.carry([0], [0])
        threads = {thread.name for thread in threading.enumerate()}
        assert any(name.startswith("kv-") for name in threads)
    until(
        lambda: not any(thread.name.startswith("kv-") for thread in threading.enumerate()),
        "a transport thread lives on",
    )


def test_a_finish_with_blocks_missing_is_no_commit(pair: Pair) -> None:
    push = pair.source.open(pair.grant([1, 2]))
    send(push, ALL, 0, [1])
    assert "missing" in str(refusal(push))
    assert "missing" in str(pair.events.failed().error)
    pair.events.quiet()


def test_the_decode_rank_aborts_in_the_middle(pair: Pair) -> None:
    grant = pair.grant(list(range(32)))
    push = pair.source.open(grant)
    send(push, range(1), 0, list(range(32)))
    until(lambda: pair.sink.stats()["chunks"] > 0, "no chunk has arrived")
    pair.sink.abort(grant)
    assert pair.events.quiet().generation == grant.generation
    assert "aborted" in str(refusal(push))
    with pytest.raises(TransferError):
        send(push, range(1, 2), 0, list(range(32)))
    pair.carry([5], [5])


def test_the_prefill_worker_aborts_in_the_middle(pair: Pair) -> None:
    grant = pair.grant([0, 1])
    push, done = pair.source.open(grant), Done()
    send(push, range(1), 0, [0, 1])
    push.abort("the client has gone", done)
    done.wait()
    assert "the client has gone" in str(pair.events.failed().error)
    pair.events.quiet()
    pair.carry([5], [5])


def test_a_grant_that_nobody_has_opened_is_quiet_at_once(pair: Pair) -> None:
    grant = pair.grant([0])
    pair.sink.abort(grant)
    pair.events.quiet()
    assert "not known here, or has ended" in str(refusal(pair.source.open(grant)))


def test_an_abort_after_the_commit_is_answered_too(pair: Pair) -> None:
    grant = pair.grant([])
    push, done = pair.source.open(grant), Done()
    push.finish(b"", done)
    pair.events.committed()
    done.wait()
    pair.sink.abort(grant)
    pair.events.quiet()


def test_a_prefill_worker_that_shuts_down_fails_what_it_had_open(pair: Pair) -> None:
    push = pair.source.open(pair.grant([0]))
    send(push, range(1), 0, [0])
    pair.source.close()
    assert "shutting down" in str(refusal(push))
    with contextlib.suppress(TransferError):
        pair.source.open(pair.grant([1]))
    if pair.sink.stats()["connections"]:
        until(lambda: not pair.sink.stats()["connections"], "the connection lives on")


@pytest.mark.parametrize("point", ["opened", "half sent", "all sent"])
def test_a_killed_prefill_worker_leaves_quiet_pages(pair: Pair, point: str) -> None:
    grant = pair.grant([1, 2, 3])
    with another_process(prefill_process, pair.transport, grant, point) as (process, pipe):
        answer(pipe)
        until(lambda: pair.sink.stats()["open_grants"] == 1, "the grant was never opened")
        process.kill()
        assert pair.events.failed().generation == grant.generation
        assert pair.events.quiet().generation == grant.generation
    pair.carry([7, 8, 9], [1, 2, 3])


def test_a_writer_into_shared_memory_that_breaks_the_protocol_is_not_quiet_while_it_lives() -> None:
    with a_pair("shm") as pair:
        peer = HandMadeSource("shm", pair.decode, pair.sink.endpoint.addresses["shm"])
        grant = pair.grant([1, 2])
        peer.open(grant)
        peer.send(Frame(Kind.CHUNK, grant.generation, Chunk(0, 1, 0, 1), PIECE - 1))
        assert "broke the KV protocol" in str(pair.events.failed().error)
        pair.carry([4], [4])
        assert pair.events.is_empty()
        assert pair.sink.stats()["quarantined_blocks"] == 2
        peer.close()
        assert pair.events.quiet().generation == grant.generation


def test_a_stopped_writer_into_shared_memory_is_not_proof_until_it_is_dead() -> None:
    with a_pair("shm") as pair:
        grant = pair.grant([1, 2])
        with another_process(prefill_process, "shm", grant, "half sent") as (process, pipe):
            answer(pipe)
            until(lambda: pair.sink.stats()["chunks"] > 0, "no chunk has arrived")
            assert process.pid is not None
            stop(process.pid)
            pair.sink.abort(grant)
            pair.carry([4], [4])  # the stopped worker holds up nobody else
            assert pair.events.is_empty()
            assert pair.sink.stats()["quarantined_blocks"] == 2
            process.kill()
            pair.events.quiet()
            assert pair.sink.stats()["quarantined_blocks"] == 0


def test_a_killed_decode_rank_fails_the_push_and_its_next_life_serves(
    transport: Transport,
) -> None:
    source = make_source(patterned(LAYOUT, 8), a_worker("prefill-0"), transport=transport)
    for _ in range(2):
        decode = a_worker()
        with another_process(decode_process, decode, transport) as (process, pipe):
            endpoint = answer(pipe)
            grants = [
                a_grant(decode, [g], generation=g, endpoint=endpoint)  # type: ignore[arg-type]
                for g in (1, 2)
            ]
            for grant in grants:
                pipe.send(grant)
                answer(pipe)
            first, done = source.open(grants[0]), Done()
            send(first, ALL, 0, [0])
            first.finish(b"", done)
            assert done.wait() is None
            second = source.open(grants[1])
            send(second, ALL, 0, [0])
            process.kill()
            assert isinstance(refusal(second), TransferError)
    source.close()


def test_late_bytes_of_an_ended_grant_never_reach_the_pages(pair: Pair) -> None:
    peer = HandMadeSource(pair.transport, pair.decode, pair.sink.endpoint.addresses[pair.transport])
    early, whole = pair.grant([6]), Chunk(0, LAYOUT.num_layers, 0, 1)
    peer.open(early)
    heard = peer.hear()
    assert heard is not None
    assert heard.kind is Kind.OPENED
    pair.sink.abort(early)
    heard = peer.hear()
    assert heard is not None
    assert heard.kind is Kind.CANCEL
    late = pair.grant([6])
    peer.open(late)
    heard = peer.hear()
    assert heard is not None
    assert heard.generation == late.generation
    before, stale = block_bytes(pair.target, 6), pair.sink.stats()["stale"]
    peer.chunk(early.generation, whole)
    peer.send(Frame(Kind.FINISH, early.generation))
    until(lambda: pair.sink.stats()["stale"] == stale + 2, "the late frames were not counted")
    assert block_bytes(pair.target, 6) == before
    peer.close()
    until(lambda: not pair.sink.stats()["live_grants"], "the later grant has not ended")


@pytest.mark.parametrize("checksum", ["full", "sampled"])
def test_bytes_that_do_not_match_their_checksum_fail_the_grant(
    transport: Transport, checksum: ChecksumChoice
) -> None:
    with a_pair(transport, checksum=checksum) as pair:
        pair.carry([3, 1, 2], [1, 2, 3])
        address = pair.sink.endpoint.addresses[transport]
        peer = HandMadeSource(transport, pair.decode, address, damaged=True)
        grant = pair.grant([6])
        peer.open(grant)
        peer.chunk(grant.generation, Chunk(0, 1, 0, 1))
        assert isinstance(pair.events.failed().error, TransferCorrupt)
        assert pair.sink.stats()["corrupt"] == 1
        peer.close()
        pair.events.quiet()


def hand_made(pair: Pair) -> HandMadeSource:
    address = pair.sink.endpoint.addresses[pair.transport]
    return HandMadeSource(pair.transport, pair.decode, address)


@pytest.mark.parametrize(
    "chunk",
    [Chunk(0, 1, 1, 2), Chunk(0, 1, 2, 1), Chunk(2, 2, 0, 1), Chunk(3, 1, 0, 1)],
    ids=["over its end", "behind its end", "over the last layer", "behind the last layer"],
)
def test_a_page_outside_the_grant_fails_the_grant_and_is_not_written(
    pair: Pair, chunk: Chunk
) -> None:
    peer, before = hand_made(pair), bytes(buffer(pair.target))
    grant = pair.grant([4, 9])
    peer.open(grant)
    length = chunk.num_layers * chunk.num_blocks * PIECE
    if pair.transport == "tcp":
        peer.send(Frame(Kind.CHUNK, grant.generation, chunk, length), body=bytes(length))
    else:
        peer.send(Frame(Kind.CHUNK, grant.generation, chunk, length))
    assert "not within" in str(pair.events.failed().error)
    peer.close()
    pair.events.quiet()
    assert bytes(buffer(pair.target)) == before
    pair.carry([1], [4])


def test_a_chunk_from_another_peer_than_the_grants_is_counted_and_not_written(pair: Pair) -> None:
    owner, stranger = hand_made(pair), hand_made(pair)
    grant = pair.grant([6])
    owner.open(grant)
    heard = owner.hear()
    assert heard is not None
    assert heard.kind is Kind.OPENED
    before, stale = block_bytes(pair.target, 6), pair.sink.stats()["stale"]
    stranger.chunk(grant.generation, Chunk(0, LAYOUT.num_layers, 0, 1))
    until(lambda: pair.sink.stats()["stale"] == stale + 1, "the chunk was not counted")
    stranger.open(grant)
    heard = stranger.hear()
    assert heard is not None
    assert heard.kind is Kind.REFUSED
    assert pair.sink.stats()["refused"] == 1
    assert block_bytes(pair.target, 6) == before
    stranger.close()
    owner.close()
    pair.events.failed()
    pair.events.quiet()


def test_a_chunk_of_a_grant_that_was_never_made_is_counted_and_not_written(pair: Pair) -> None:
    peer, before = hand_made(pair), bytes(buffer(pair.target))
    peer.chunk(Generation(777), Chunk(0, 1, 0, 1))
    until(lambda: pair.sink.stats()["unknown"] == 1, "the chunk was not counted")
    assert bytes(buffer(pair.target)) == before
    peer.close()


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Kind.CHUNK, 1, Chunk(0, 1, 0, 1), PIECE - 1),  # type: ignore[arg-type]
        Frame(Kind.COMMITTED, 1),  # type: ignore[arg-type]
        Frame(Kind.CHUNK, 1, Chunk(0, 60000, 0, 4000000), 4000000000),  # type: ignore[arg-type]
    ],
    ids=["a wrong length", "the other side's line", "a chunk of four gigabytes"],
)
def test_a_peer_that_breaks_the_protocol_is_cut_off(pair: Pair, frame: Frame) -> None:
    peer = HandMadeSource(pair.transport, pair.decode, pair.sink.endpoint.addresses[pair.transport])
    peer.send(frame)
    assert peer.hear() is None
    peer.close()
    until(lambda: not pair.sink.stats()["connections"], "the connection lives on")
    assert pair.sink.stats()["refused_connections"] == 1
    pair.carry([1], [1])


def test_with_a_cluster_key_blocks_arrive(transport: Transport) -> None:
    with a_pair(transport, cluster_key=KEY) as pair:
        pair.carry([1, 5, 6], [2, 9, 1])


def test_a_frame_without_the_connections_key_is_cut_off(transport: Transport) -> None:
    with a_pair(transport, cluster_key=KEY) as pair:
        address = pair.sink.endpoint.addresses[transport]
        peer = HandMadeSource(transport, pair.decode, address, KEY)
        peer.send(Frame(Kind.FINISH, pair.grant([1]).generation))
        peer.sock.sendall(b"HRKV\1\3" + bytes(46))
        assert peer.hear() is None
        peer.close()


@pytest.mark.parametrize("key", [None, b"another key"], ids=["no key", "another key"])
def test_a_prefill_worker_without_the_right_key_is_refused(
    transport: Transport, key: bytes | None
) -> None:
    with a_pair(transport, cluster_key=KEY) as pair:
        stranger = make_source(
            pair.memory, a_worker("prefill-1"), transport=transport, cluster_key=key
        )
        assert "key" in str(refusal(stranger.open(pair.grant([1]))))
        stranger.close()
        pair.carry([2], [2])


def test_a_decode_rank_without_the_key_is_not_trusted(transport: Transport) -> None:
    with a_pair(transport) as pair:
        careful = make_source(
            pair.memory, a_worker("prefill-1"), transport=transport, cluster_key=KEY
        )
        assert "key" in str(refusal(careful.open(pair.grant([1]))))
        careful.close()


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\n\r\n", b"HRKV\xff\xff\xff\xff", b"HRKV\x03\0\0\0abc", b""],
    ids=["http", "a huge length", "not a message", "nothing"],
)
def test_garbage_is_refused_and_the_next_transfer_works(transport: Transport, data: bytes) -> None:
    with a_pair(transport, limits=TransferLimits(handshake_s=0.5)) as pair:
        stranger = dial(transport, pair.sink.endpoint.addresses[transport])
        stranger.settimeout(WAIT_S)
        stranger.sendall(data)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
        stranger.close()
        until(lambda: pair.sink.stats()["refused_connections"] == 1, "nobody was refused")
        pair.carry([1], [1])


def test_strangers_beyond_the_cap_are_turned_away(transport: Transport) -> None:
    limits = TransferLimits(max_handshakes=2, handshake_s=WAIT_S)
    with a_pair(transport, limits=limits) as pair:
        address = pair.sink.endpoint.addresses[transport]
        strangers = [dial(transport, address) for _ in range(5)]
        until(lambda: pair.sink.stats()["refused_connections"] == 3, "the cap did not hold")
        assert pair.sink.stats()["connections"] == 2
        for stranger in strangers:
            stranger.close()
        until(lambda: not pair.sink.stats()["connections"], "the strangers are still there")
        pair.carry([1], [1])


def test_another_life_of_the_decode_rank_is_not_taken_for_this_one(pair: Pair) -> None:
    grant = a_grant(a_worker(), [1], endpoint=pair.sink.endpoint)
    assert "earlier life" in str(refusal(pair.source.open(grant)))


def test_another_layout_is_a_deployment_fault(pair: Pair) -> None:
    other = KVLayout(
        kind="gqa",
        dtype="float32",
        num_layers=4,
        block_tokens=4,
        kv_heads=2,
        key_width=4,
        value_width=4,
    )
    with pytest.raises(LayoutMismatch):
        pair.source.open(a_grant(pair.decode, [1], layout=other, endpoint=pair.sink.endpoint))
    source = make_source(patterned(other, 4), a_worker("prefill-1"), transport=pair.transport)
    grant = a_grant(pair.decode, [1], layout=other, endpoint=pair.sink.endpoint)
    assert isinstance(refusal(source.open(grant)), LayoutMismatch)
    source.close()


def test_a_decode_rank_that_does_not_open_the_grant_fails_the_push(transport: Transport) -> None:
    limits = TransferLimits(handshake_s=WAIT_S, open_s=BRIEF_S, probe_bytes=0)
    with a_pair(transport, limits=limits) as pair, a_deaf_sink(pair, []) as grant:
        error = refusal(pair.source.open(grant))
        assert isinstance(error, TransferTimeout)
        assert "not opened" in str(error)


def test_a_decode_rank_that_does_not_commit_fails_the_push(transport: Transport) -> None:
    limits = TransferLimits(handshake_s=WAIT_S, open_s=WAIT_S, commit_s=BRIEF_S, probe_bytes=0)
    with a_pair(transport, limits=limits) as pair, a_deaf_sink(pair, [Kind.OPENED]) as grant:
        error = refusal(pair.source.open(grant))
        assert isinstance(error, TransferTimeout)
        assert "not committed" in str(error)


def test_a_decode_rank_that_stops_reading_fails_the_push() -> None:
    layout = KVLayout(
        kind="mla",
        dtype="float32",
        num_layers=1,
        block_tokens=1024,
        kv_heads=1,
        key_width=512,
        value_width=0,
    )
    with (
        a_pair("tcp", layout=layout, limits=TransferLimits(stall_s=BRIEF_S, probe_bytes=0)) as pair,
        a_deaf_sink(pair, [Kind.OPENED], blocks=16) as grant,
    ):
        push = pair.source.open(grant)
        send(push, range(1), 0, list(range(16)))
        assert "taken nothing" in str(refusal(push))


def test_a_prefill_worker_that_stops_inside_a_frame_is_cut_off() -> None:
    with a_pair("tcp", limits=TransferLimits(stall_s=BRIEF_S)) as pair:
        peer = HandMadeSource("tcp", pair.decode, pair.sink.endpoint.addresses["tcp"])
        grant = pair.grant([1])
        peer.open(grant)
        peer.send(Frame(Kind.CHUNK, grant.generation, Chunk(0, 1, 0, 1), PIECE), body=b"\1")
        assert "stopped inside a frame" in str(pair.events.failed().error)
        pair.events.quiet()
        peer.close()


@contextlib.contextmanager
def a_deaf_sink(pair: Pair, answers: list[Kind], blocks: int = 1) -> Generator[Grant]:
    """A grant whose decode rank shakes hands, says ``answers`` and then never reads again."""
    carrier = make_carriers()[pair.transport]
    if carrier.control == "unix":
        listener, address = shm.listen()
    else:
        listener = socket.create_server(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    addresses: dict[str, str] = {pair.transport: address}
    decode, over = a_worker("decode-deaf"), threading.Event()
    endpoint = KVEndpoint(
        host_id=pair.sink.endpoint.host_id, num_blocks=NUM_BLOCKS, addresses=addresses
    )

    def serve() -> None:
        sock, _ = listener.accept()
        admitted = admit(
            sock,
            decode=decode,
            layout=pair.target.layout,
            num_blocks=pair.target.num_blocks,
            checksum="off",
            cluster_key=None,
            timeout_s=WAIT_S,
        )
        inlet = carrier.inlet(
            Receiving(
                sock=sock,
                reader=Reader(sock, WAIT_S),
                memory=pair.target,
                checksum="off",
                payload="exact",
                worker=decode,
                admitted=admitted,
                limits=TransferLimits(),
            )
        )
        for kind in answers:
            sock.recv(1)  # the OPEN is on its way
            sock.sendall(control(kind, Generation(1), admitted.outgoing))
        over.wait(WAIT_S)
        inlet.close()
        sock.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield a_grant(decode, list(range(blocks)), endpoint=endpoint, layout=pair.target.layout)
    finally:
        over.set()
        thread.join(WAIT_S)
        listener.close()


def test_a_sink_has_no_name_in_the_file_system() -> None:
    with a_pair("shm") as pair:
        pair.carry([1], [1])
        named = [*Path("/dev/shm").glob("*headrace*"), *Path("/tmp").glob("*headrace-kv*")]
        assert named == []


def test_the_source_blocks_are_only_read(pair: Pair) -> None:
    before = bytes(buffer(pair.memory))
    pair.carry(list(range(32)), list(range(32)))
    assert bytes(buffer(pair.memory)) == before


def test_a_link_reports_what_has_gone_over_it(pair: Pair) -> None:
    pair.carry([1, 2], [3, 4])
    (link,) = pair.source.links()
    assert (link.decode, link.transport) == (pair.decode.worker_id, pair.transport)
    assert link.bytes == 2 * LAYOUT.block_bytes
    assert f"kv.transport is {pair.transport}" in link.reason
    until(lambda: pair.source.links()[0].measured_bytes_per_s > 0, "the link was not measured")


def test_what_the_decode_rank_does_not_offer_is_refused_with_the_reason(pair: Pair) -> None:
    other: Transport = "tcp" if pair.transport == "shm" else "shm"
    source = make_source(pair.memory, a_worker("prefill-2"), transport=other)
    with pytest.raises(TransferError, match=f"{other}: the decode rank does not offer it"):
        source.open(pair.grant([1]))
    source.close()


@pytest.mark.parametrize("garbage", [b"", b"\xc1", b"\x80"], ids=["nothing", "noise", "no fields"])
def test_a_peer_whose_terms_make_no_sense_is_refused(garbage: bytes) -> None:
    pytest.importorskip("nixl")
    with a_pair("nixl") as pair:
        sock = dial("nixl", pair.sink.endpoint.addresses["nixl"])
        connected = connect(
            sock,
            source=a_worker("prefill-7"),
            decode=pair.decode,
            layout_digest=LAYOUT.digest(),
            cluster_key=None,
            timeout_s=WAIT_S,
        )
        terms.hear(sock, connected.incoming, WAIT_S)
        terms.tell(sock, connected.outgoing, garbage, WAIT_S)
        sock.settimeout(WAIT_S)
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
        sock.close()
        until(lambda: pair.sink.stats()["refused_connections"] == 1, "nobody was refused")
        pair.carry([1], [1])
