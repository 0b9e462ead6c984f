"""The wire of a stream, byte by byte, and what it does while nothing happens."""

import json
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager

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


def test_the_outcome_is_complete_although_the_server_then_reports_a_disconnect() -> None:
    """Servers say ``http.disconnect`` after the last byte of a response too."""

    async def scenario() -> Outcome:
        over = anyio.Event()

        async def receive() -> Message:
            await over.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body" and not message["more_body"]:
                over.set()
                await anyio.lowlevel.checkpoint()
                await anyio.lowlevel.checkpoint()

        async def produce(stream: EventStream) -> None:
            stream.write(b"data: 1\n\n")

        return await EventStream(receive, send, headers=[], times=StreamTimes()).run(produce)

    assert anyio.run(scenario) is Outcome.COMPLETE


class Wire:
    """The server's side of a connection whose client reads when the test says so."""

    def __init__(self, *, reads: bool) -> None:
        self.body = b""
        self.messages = 0
        self.readable = anyio.Event()
        if reads:
            self.readable.set()

    async def receive(self) -> Message:
        await anyio.sleep_forever()
        raise AssertionError

    async def send(self, message: Message) -> None:
        await self.readable.wait()
        self.messages += 1
        self.body += message.get("body", b"")


def some_answer(events: int) -> bytes:
    return b"".join(b"data: %d\n\n" % number for number in range(events))


def test_what_a_client_is_not_ready_for_gathers_and_is_sent_once_and_in_order() -> None:
    async def scenario() -> None:
        wire = Wire(reads=False)
        gathered: list[bytes] = []

        def take() -> bytes:
            events = b"".join(gathered)
            gathered.clear()
            return events

        async def produce(stream: EventStream) -> None:
            stream.write(b"data: 0\n\n")
            for number in range(1, 100):
                await anyio.lowlevel.checkpoint()
                assert not stream.keeps_up
                gathered.append(b"data: %d\n\n" % number)
                stream.gather(take)
            wire.readable.set()

        stream = EventStream(wire.receive, wire.send, headers=[], times=StreamTimes())
        assert await stream.run(produce) is Outcome.COMPLETE
        assert wire.body == some_answer(100) + b"data: [DONE]\n\n"
        assert wire.messages == 4  # the head, what came first, what gathered, the end

    anyio.run(scenario)


def test_the_last_events_go_out_in_one_piece_with_done() -> None:
    async def scenario() -> None:
        wire = Wire(reads=True)

        async def produce(stream: EventStream) -> None:
            stream.write_last(some_answer(1))

        stream = EventStream(wire.receive, wire.send, headers=[], times=StreamTimes())
        assert await stream.run(produce) is Outcome.COMPLETE
        assert wire.body == some_answer(1) + b"data: [DONE]\n\n"
        assert wire.messages == 2

    anyio.run(scenario)


def test_a_failure_after_the_last_events_comes_after_them_and_without_done() -> None:
    async def scenario() -> None:
        wire = Wire(reads=True)

        async def produce(stream: EventStream) -> None:
            stream.write_last(some_answer(1))
            raise WorkerLost("gone", stage="decode")

        stream = EventStream(wire.receive, wire.send, headers=[], times=StreamTimes())
        assert await stream.run(produce) is Outcome.FAILED
        assert wire.body.startswith(some_answer(1) + b"event: error\n")
        assert b"[DONE]" not in wire.body

    anyio.run(scenario)


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
