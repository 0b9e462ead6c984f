"""Tokens that are written without Python for each: the same bytes, whatever else happens."""

import json
import random
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.plain_tokens import pack_token
from server.metrics import Latencies
from server.step_kernel import AROUND_BYTES, SLOTS, TOKENS
from server.step_writer import StepWriter
from tests.support.gateway import a_writer, demo_text, demo_token_texts

AROUND = (b'data: {"text":', b"}\n\n")
TOKENIZER = demo_text().tokenizer
SPECIAL = min(TOKENIZER.special_ids)
PART_OF_A_CHARACTER = next(i for i in range(1000) if TOKENIZER.whole_text(i) is None)
WORDS = [i for i in range(300, 400) if TOKENIZER.whole_text(i)]


@contextmanager
def a_stream(
    writer: StepWriter, *, around: tuple[bytes, bytes] = AROUND, send_buffer: int = 1 << 16
) -> Iterator[tuple[int, socket.socket]]:
    """Its number, and the client's side of its socket; its next token has offset 1."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        ours.setblocking(False)
        theirs.setblocking(False)
        stream = writer.number()
        now = time.monotonic()
        writer.enter(stream, offset=1, descriptor=ours.fileno(), around=around, at=now)
        yield stream, theirs


def chunk(token_id: int, around: tuple[bytes, bytes] = AROUND) -> bytes:
    text = json.dumps(TOKENIZER.whole_text(token_id), ensure_ascii=False).encode()
    event = around[0] + text + around[1]
    return b"%x\r\n%b\r\n" % (len(event), event)


def received(client: socket.socket) -> bytes:
    data = b""
    try:
        while part := client.recv(1 << 20):
            data += part
    except BlockingIOError:
        pass
    return data


Record = tuple[int, int, int]  # which stream, how far its offset is from the next, token
TOKEN_IDS = st.sampled_from([*WORDS[:5], SPECIAL, PART_OF_A_CHARACTER, TOKENIZER.vocab_size + 7])
RECORDS = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from([0] * 8 + [1, -1]), TOKEN_IDS), max_size=30
)


@given(st.lists(RECORDS, max_size=4))
@settings(max_examples=200, deadline=None)
def test_a_token_is_written_or_left_and_never_out_of_order(steps: list[list[Record]]) -> None:
    writer = a_writer()
    with a_stream(writer) as (first, first_client), a_stream(writer) as (second, second_client):
        never_came, unknown = writer.number(), 123 << 40
        streams = [first, second, never_came, unknown]
        taken: dict[int, list[int]] = {first: [], second: []}
        for step in steps:
            records, expected_left = bytearray(), []
            for place, (which, distance, token_id) in enumerate(step):
                stream = streams[which]
                wanted = 1 + len(taken.get(stream, ()))
                records += pack_token(stream, max(wanted + distance, 0), token_id)
                if stream in taken and distance == 0 and token_id in WORDS:
                    taken[stream].append(token_id)
                else:
                    expected_left.append(place)
            left, behind = writer.write(records)
            assert list(left) == expected_left
            assert not behind
        for stream, client in ((first, first_client), (second, second_client)):
            assert received(client) == b"".join(map(chunk, taken[stream]))
            written = writer.leave(stream)
            assert list(written.token_ids) == taken[stream]
            assert written.unsent == b""


def test_what_a_socket_does_not_take_is_given_back() -> None:
    writer = a_writer()
    around = (b"x" * 700, b"\n")
    with a_stream(writer, around=around, send_buffer=4096) as (stream, client):
        sent: list[int] = []
        behind: Sequence[int] = ()
        while not behind:
            sent.append(random.Random(len(sent)).choice(WORDS))
            left, behind = writer.write(bytearray(pack_token(stream, len(sent), sent[-1])))
            assert not left
        assert list(behind) == [stream]
        unsent = writer.leave(stream).unsent
        assert unsent
        assert received(client) + unsent == b"".join(chunk(i, around) for i in sent)


def test_a_stream_that_has_no_room_left_is_left() -> None:
    writer = a_writer()
    with a_stream(writer) as (stream, client):
        records = b"".join(pack_token(stream, 1 + i, WORDS[0]) for i in range(TOKENS + 2))
        left, _ = writer.write(bytearray(records))
        assert list(left) == [TOKENS, TOKENS + 1]
        assert received(client) == TOKENS * chunk(WORDS[0])


def test_a_stream_that_has_left_is_written_to_no_more() -> None:
    writer = a_writer()
    with a_stream(writer) as (stream, client):
        writer.leave(stream)
        writer.release(stream)
        again = writer.number()
        assert again % SLOTS == stream % SLOTS
        assert again != stream
        left, _ = writer.write(bytearray(pack_token(stream, 1, WORDS[0])))
        assert list(left) == [0]
        assert received(client) == b""


def test_numbers_run_out_and_come_back() -> None:
    writer = a_writer()
    numbers = [writer.number() for _ in range(SLOTS)]
    assert len(set(numbers)) == SLOTS
    assert 0 not in numbers
    assert writer.number() == 0
    writer.release(numbers[7])
    assert writer.number() % SLOTS == numbers[7] % SLOTS


def test_times_between_tokens_are_counted() -> None:
    gaps = Latencies("gaps", "", (0.001, 60.0))
    writer = StepWriter(demo_token_texts(), gaps)
    with a_stream(writer) as (stream, _client):
        writer.write(bytearray(pack_token(stream, 1, WORDS[0]) + pack_token(stream, 2, WORDS[1])))
    assert sum(gaps.counts()) == 2
    assert gaps.counts()[0] >= 1  # two at once


def test_there_is_room_for_so_much_around_a_text() -> None:
    writer = a_writer()
    assert writer.takes((b"x" * AROUND_BYTES, b""))
    assert not writer.takes((b"x" * AROUND_BYTES, b"y"))
