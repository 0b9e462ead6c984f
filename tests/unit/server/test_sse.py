"""The wire of a stream, byte by byte, and what it does while nothing happens."""

import asyncio
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from functools import partial

import anyio
import httpx
import pytest
from starlette.types import Message

from protocol.errors import WorkerLost
from server.app import create_app
from server.openai.sse import EventStream, Outcome, StreamTimes
from server.settings import GatewaySettings, LimitSettings
from tests.support.generator import ScriptedGenerator
from tests.support.http_server import eventually, serve
from tests.support.model_text import byte_model_text

TEXT = byte_model_text()
BODY = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
IMPATIENT = StreamTimes(early_headers_s=0.04, keep_alive_s=0.04, write_stall_s=30.0)


@contextmanager
def served(
    generator: ScriptedGenerator, times: StreamTimes | None = None
) -> Generator[httpx.Client]:
    app = create_app(generator, TEXT, GatewaySettings(), times=times)
    with serve(app) as url, httpx.Client(base_url=url, timeout=10) as client:
        yield client


def test_a_complete_stream_ends_with_done_and_says_how_to_be_proxied() -> None:
    with served(ScriptedGenerator(text=TEXT)) as client:
        response = client.post("/v1/chat/completions", json=BODY)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.text.endswith("data: [DONE]\n\n")
    assert response.text.count("[DONE]") == 1


def read_until_cut(response: httpx.Response) -> str:
    parts: list[str] = []
    with pytest.raises(httpx.RemoteProtocolError):
        parts.extend(response.iter_text())
    return "".join(parts)


def test_a_broken_stream_ends_with_an_error_event_and_a_cut_connection() -> None:
    generator = ScriptedGenerator(text=TEXT, fail_at=3, error=WorkerLost("gone", stage="decode"))
    with served(generator) as client, client.stream("POST", "/v1/chat/completions", json=BODY) as r:
        text = read_until_cut(r)
    *events, last, rest = text.split("\n\n")
    assert rest == ""
    assert last.startswith('event: error\ndata: {"error":{"message":')
    assert '"code":"worker_lost"' in last
    assert "stage: decode" in last
    assert all('"finish_reason":null' in event for event in events)
    assert "[DONE]" not in text


def test_a_long_silence_is_filled_with_comments_from_the_headers_on() -> None:
    generator = ScriptedGenerator(text=TEXT, block_at=0)
    with (
        served(generator, IMPATIENT) as client,
        client.stream("POST", "/v1/chat/completions", json=BODY) as response,
    ):
        assert response.status_code == 200
        parts = response.iter_text()
        assert next(parts).startswith(": keep-alive\n\n")
        assert next(parts).startswith(": keep-alive\n\n")
    assert eventually(lambda: generator.closed == 1)


def test_a_pause_in_mid_stream_is_filled_with_comments() -> None:
    generator = ScriptedGenerator(text=TEXT, block_at=2)
    with (
        served(generator, IMPATIENT) as client,
        client.stream("POST", "/v1/chat/completions", json=BODY) as response,
    ):
        text = ""
        for part in response.iter_text():
            text += part
            if text.count(": keep-alive") == 2:
                break
    assert text.index('"content":"e"') < text.index(": keep-alive")


def test_a_failure_after_early_headers_is_an_error_event() -> None:
    resume = threading.Event()
    generator = ScriptedGenerator(text=TEXT, block_at=0, resume=resume, fail_at=0)
    with (
        served(generator, IMPATIENT) as client,
        client.stream("POST", "/v1/chat/completions", json=BODY) as response,
    ):
        assert response.status_code == 200  # so the headers are out before anything fails
        resume.set()
        text = read_until_cut(response)
    assert text.startswith(": keep-alive\n\n")
    assert "event: error" in text


def test_a_client_that_stops_reading_is_dropped() -> None:
    generator = ScriptedGenerator(text=TEXT, reply="x" * 90_000, max_model_len=100_000)
    times = StreamTimes(write_stall_s=0.1)
    app = create_app(generator, TEXT, GatewaySettings(), times=times)
    with serve(app) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect((host, int(port)))
            body = b'{"model":"tiny","stream":true,"prompt":"hi","max_tokens":90000}'
            head = (
                "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\n\r\n"
            )
            deaf.sendall(head.encode() + body)
            assert eventually(lambda: generator.opened == 1)
            assert eventually(lambda: generator.closed == 1)


@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "growing"])
def test_an_upload_that_is_too_large_gets_its_answer(chunked: bool) -> None:
    megabyte = b" " * 2**20
    content = iter([megabyte] * 9) if chunked else megabyte * 9
    headers = {"content-type": "application/json"}
    with served(ScriptedGenerator(text=TEXT)) as client:
        response = client.post("/v1/completions", content=content, headers=headers)
    assert response.status_code == 413
    assert "8388608" in response.json()["error"]["message"]


def test_a_body_that_does_not_come_is_408() -> None:
    settings = GatewaySettings(limits=LimitSettings(body_timeout_s=0.05))
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: 10\r\n\r\n{"
    )
    with serve(create_app(ScriptedGenerator(text=TEXT), TEXT, settings)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(head)
            assert slow.recv(64).startswith(b"HTTP/1.1 408 ")


class Wire:
    """An exchange whose client reads when the test says so, and the ``send`` that belongs to it."""

    def __init__(self, *, clear: bool) -> None:
        self.clear = clear
        self.lost = False
        self.writes_looked_at = 0
        self.aborted = False
        self.body = b""
        self.writes = 0
        self._on_change: Callable[[], None] | None = None

    def listen(self, on_change: Callable[[], None] | None) -> None:
        self._on_change = on_change

    def change(self, *, clear: bool = False, lost: bool = False) -> None:
        self.clear, self.lost = clear, lost
        if self._on_change is not None:
            self._on_change()

    def write(self, data: bytes) -> None:
        assert data
        self.writes += 1
        self.body += data

    def has_been_quiet(self) -> bool:
        before, self.writes_looked_at = self.writes_looked_at, self.writes
        return before == self.writes

    def lend(self, recall: Callable[[], None]) -> int | None:
        return None

    def end_loan(self, unsent: bytes, *, wrote: bool) -> None:
        raise AssertionError("nothing was lent")

    def abort(self) -> None:
        self.aborted = True
        self.change(lost=True)

    async def send(self, message: Message) -> None:
        assert self.clear
        if message["type"] == "http.response.body":
            self.writes += 1
            self.body += message["body"]
            if not message["more_body"]:
                self.change(lost=True)  # servers may report a disconnect after the last byte too


def run(
    wire: Wire,
    produce: Callable[[EventStream], Awaitable[None]],
    times: StreamTimes | None = None,
) -> Outcome:
    async def scenario() -> Outcome:
        stream = EventStream(wire, wire.send, headers=[], times=times or StreamTimes())
        return await stream.run(produce)

    return anyio.run(scenario)


def some_events(count: int) -> bytes:
    return b"".join(b"data: %d\n\n" % number for number in range(count))


def test_the_last_events_go_out_in_one_piece_with_done() -> None:
    async def produce(stream: EventStream) -> None:
        stream.write_last(some_events(1))

    wire = Wire(clear=True)
    assert run(wire, produce) is Outcome.COMPLETE
    assert wire.body == some_events(1) + b"data: [DONE]\n\n"
    assert wire.writes == 1


def test_what_a_client_is_not_ready_for_gathers_and_is_sent_once_and_in_order() -> None:
    wire = Wire(clear=True)
    gathered: list[bytes] = []

    def take() -> bytes:
        events = b"".join(gathered)
        gathered.clear()
        return events

    async def produce(stream: EventStream) -> None:
        stream.write(b"data: 0\n\n")
        wire.clear = False
        stream.write(b"data: 1\n\n")
        for number in range(2, 100):
            assert not stream.keeps_up
            gathered.append(b"data: %d\n\n" % number)
            stream.gather(take)
        wire.change(clear=True)

    assert run(wire, produce) is Outcome.COMPLETE
    assert wire.body == some_events(100) + b"data: [DONE]\n\n"
    assert wire.writes == 3  # what came first, what was kept or gathered, the end


def test_a_failure_comes_after_all_that_was_kept_and_without_done() -> None:
    wire = Wire(clear=True)

    async def produce(stream: EventStream) -> None:
        stream.write(b"data: 0\n\n")
        wire.clear = False
        stream.gather(lambda: b"data: 1\n\n")
        asyncio.get_running_loop().call_soon(partial(wire.change, clear=True))
        raise WorkerLost("gone", stage="decode")

    assert run(wire, produce) is Outcome.FAILED
    assert wire.body.startswith(some_events(2) + b"event: error\n")
    assert b"[DONE]" not in wire.body


def test_a_client_that_has_gone_before_the_answer_began_is_noticed() -> None:
    wire = Wire(clear=False)
    wire.lost = True

    async def produce(_stream: EventStream) -> None:
        await anyio.sleep_forever()

    assert run(wire, produce) is Outcome.HUNG_UP
    assert wire.writes == 0


def test_a_stalled_client_is_cut_off_also_when_the_answer_is_ready() -> None:
    wire = Wire(clear=False)

    async def produce(stream: EventStream) -> None:
        stream.write_last(some_events(1))

    assert run(wire, produce, StreamTimes(write_stall_s=0.02)) is Outcome.STALLED
    assert wire.aborted


def test_a_slow_reader_gets_the_whole_answer() -> None:
    """It reads nothing until all tokens have been made: far more than the sockets can hold."""
    reply = "".join(f"{number} " for number in range(12_000))
    size = len(reply) + 1
    generator = ScriptedGenerator(text=TEXT, reply=reply, max_model_len=2 * size)
    with served(generator) as client:
        body = {"model": "tiny", "stream": True, "prompt": "hi", "max_tokens": size}
        with client.stream("POST", "/v1/completions", json=body) as response:
            assert eventually(lambda: generator.closed == 1, within_s=60.0)
            lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == reply
    assert len(chunks) < size / 2  # what gathered has become few large events
