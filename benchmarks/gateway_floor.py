"""The least that streaming costs on this machine: a gateway's system calls, and no gateway.

One process stands between client and workers and does what no gateway can leave out: it receives
requests, sends them on, receives one frame for each engine step of a rank, and writes an event to
the socket of each stream that the frame names. The events have been ready since it started. It
reads nothing of HTTP, has no event loop but epoll, and its bus is a pair of sockets, no threads.

A second process stands for the workers and keeps their pace; its CPU does not count.
"""

import os
import select
import socket
import time
from array import array
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from itertools import cycle

import orjson
import psutil

from benchmarks.child import child, wait_for_port
from runtime.collector import spare_the_collector

FRAME_BYTES = 65_536  # more than any frame has
FIRST, NEXT, LAST = range(3)
REQUEST_END = b"}}"  # of the load client's bodies, and nowhere else in them


@contextmanager
def floor_process(
    port: int, *, tokens: int, first_token_s: float, step_s: float, ranks: int
) -> Generator[psutil.Process]:
    """The process whose CPU counts, listening at ``port``, with its workers. Every stream has
    ``tokens`` tokens.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with (
        ours,
        theirs,
        child(serve_floor, port, ours, tokens) as process,
        child(keep_pace, theirs, tokens, first_token_s, step_s, ranks),
    ):
        wait_for_port(port)
        yield process


def serve_floor(port: int, bus: socket.socket, tokens: int) -> None:
    """A frame from ``bus`` has two numbers for each event: the stream, which is its socket's file
    descriptor, and FIRST, NEXT or LAST. A frame to it has a stream, and what was received there.
    """
    events = _events(tokens)
    clients: dict[int, socket.socket] = {}
    with socket.create_server(("127.0.0.1", port), backlog=2048) as listener:
        poll = select.epoll()
        poll.register(listener, select.EPOLLIN)
        poll.register(bus, select.EPOLLIN)
        while True:
            for ready, _ in poll.poll():
                if ready == bus.fileno():
                    frame = array("I", bus.recv(FRAME_BYTES))
                    for stream, which in zip(frame[::2], frame[1::2], strict=True):
                        os.write(stream, events[which])
                elif ready == listener.fileno():
                    client, _address = listener.accept()
                    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    clients[client.fileno()] = client
                    poll.register(client, select.EPOLLIN)
                elif received := clients[ready].recv(FRAME_BYTES):
                    bus.send(array("I", (ready,)).tobytes() + received)
                else:
                    poll.unregister(ready)
                    clients.pop(ready).close()


def _events(tokens: int) -> tuple[bytes, bytes, bytes]:
    """What the gateway sends, in its own sizes."""
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
        b"cache-control: no-cache\r\nx-accel-buffering: no\r\n"
        b"server-timing: wait;dur=1.0, queue;dur=0.0, prefill;dur=20.0, ttft;dur=21.0\r\n"
        b"x-request-id: 0123456789abcdef01234567\r\nopenai-processing-ms: 21\r\n"
        b"transfer-encoding: chunked\r\n\r\n"
    )
    text = _chunk(_event({"content": "word"}))
    first = head + _chunk(_event({"role": "assistant", "content": ""})) + text
    usage = _chunk({**_event({}), "choices": [], "usage": {"completion_tokens": tokens}})
    last = text + _chunk(_event({}, finish="length")) + usage
    return first, text, last + _framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def _event(delta: dict[str, str], finish: str | None = None) -> dict[str, object]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {
        "id": "chatcmpl-0123456789abcdef01234567",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": "arithmetic",
        "choices": [choice],
        "usage": None,
    }


def _chunk(payload: dict[str, object]) -> bytes:
    return _framed(b"data: %b\n\n" % orjson.dumps(payload))


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def keep_pace(
    bus: socket.socket, tokens: int, first_token_s: float, step_s: float, ranks: int
) -> None:
    """A stream's first token comes by itself ``first_token_s`` after it was asked for, the others
    in the steps of one of the ranks.
    """
    spare_the_collector()
    bodies: dict[int, bytes] = {}
    asked: deque[tuple[float, int]] = deque()  # when due, stream
    running: list[dict[int, int]] = [{} for _ in range(ranks)]  # tokens left, by stream
    now = time.monotonic()
    steps_due = [now + step_s * rank / ranks for rank in range(ranks)]
    next_rank = cycle(running)
    while True:
        dues = [due for due, left in zip(steps_due, running, strict=True) if left]
        dues += [asked[0][0]] if asked else []
        wait_s = max(0.0, min(dues) - time.monotonic()) if dues else None
        if select.select([bus], [], [], wait_s)[0]:
            frame = bus.recv(FRAME_BYTES)
            stream = array("I", frame[:4])[0]
            bodies[stream] = bodies.get(stream, b"") + frame[4:]
            if bodies[stream].endswith(REQUEST_END):
                del bodies[stream]
                asked.append((time.monotonic() + first_token_s, stream))
        now = time.monotonic()
        while asked and asked[0][0] <= now:
            _, stream = asked.popleft()
            bus.send(array("I", (stream, FIRST)))
            next(next_rank)[stream] = tokens - 1
        for rank, left in enumerate(running):
            if now >= steps_due[rank]:
                if left:
                    bus.send(_step(left))
                steps_due[rank] = max(steps_due[rank] + step_s, now)


def _step(left: dict[int, int]) -> "array[int]":
    """The frame of one engine step; who has had the last token is left out of the next."""
    frame = array("I")
    for stream, count in list(left.items()):
        frame.extend((stream, NEXT if count > 1 else LAST))
        left[stream] = count - 1
        if count == 1:
            del left[stream]
    return frame
