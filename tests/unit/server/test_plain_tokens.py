"""Streams over HTTP whose tokens the step writer writes: the client sees no difference."""

import asyncio
import errno
import json
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
import pytest

from server.openai.sse import StreamTimes
from tests.support.arithmetic import MODEL
from tests.support.gateway import CountingWriter, a_gateway, a_writer
from tests.support.polling import eventually
from tests.support.system import LONG_S, System, a_system
from tests.support.workers import Pace

pytestmark = pytest.mark.anyio
PACE = Pace(first_token_s=0.0, step_s=0.001)
TOKENS = 300  # more than the writer has room for at a time
CHAT = {"messages": [{"role": "user", "content": "headrace"}]}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def a_server(
    writer: CountingWriter | None,
    *,
    groups: int = 1,
    times: StreamTimes | None = None,
    send_buffer: int | None = None,
) -> AsyncGenerator[tuple[System, str]]:
    async with (
        a_system(groups=groups, pace=PACE, patience_s=LONG_S, writer=writer) as system,
        a_gateway(system, times=times, send_buffer=send_buffer) as (port, _),
    ):
        yield system, f"http://127.0.0.1:{port}/v1/"


def a_body(**fields: object) -> dict[str, Any]:
    body = {"model": MODEL, "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
    return {**body, "stream": True, **fields}


async def events(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Of an answer that ends as it must, without what differs from answer to answer."""
    async with httpx.AsyncClient(timeout=LONG_S) as client:
        path = "completions" if "prompt" in body else "chat/completions"
        answer = await client.post(url + path, json=body)
    assert answer.status_code == 200, answer.text
    lines = [line for line in answer.text.split("\n") if line and not line.startswith(":")]
    assert lines.pop() == "data: [DONE]"
    found = [json.loads(line.removeprefix("data: ")) for line in lines]
    return [{k: v for k, v in event.items() if k not in {"id", "created"}} for event in found]


@pytest.mark.parametrize(
    ("fields", "is_written"),
    [
        pytest.param(CHAT, True, id="chat"),
        pytest.param({"prompt": "headrace"}, True, id="completion"),
        pytest.param({**CHAT, "stream_options": {"include_usage": True}}, True, id="usage"),
        pytest.param(
            {**CHAT, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
            False,
            id="continuous usage",
        ),
        pytest.param({**CHAT, "n": 2}, False, id="choices"),
        pytest.param({**CHAT, "stop": ["zz"]}, False, id="stop"),
        pytest.param({**CHAT, "return_token_ids": True}, False, id="token ids"),
        pytest.param({**CHAT, "skip_special_tokens": False}, True, id="special tokens"),
    ],
)
async def test_the_events_are_the_same(fields: dict[str, Any], is_written: bool) -> None:
    async with a_server(None) as (_, url):
        expected = await events(url, a_body(**fields))
    writer = a_writer()
    async with a_server(writer) as (system, url):
        assert await events(url, a_body(**fields)) == expected
        assert (writer.written > TOKENS // 2) == is_written
        await system.idle()


async def test_a_stream_that_moves_says_everything_once() -> None:
    async with a_server(None) as (_, url):
        expected = await events(url, a_body(**CHAT))
    writer = a_writer()
    found: list[dict[str, Any]] = []
    async with a_server(writer, groups=2) as (system, url), anyio.create_task_group() as tasks:

        async def ask() -> None:
            found.extend(await events(url, a_body(**CHAT)))

        tasks.start_soon(ask)
        await eventually(lambda: writer.written > 0, "tokens that were written")
        rank = next(rank for rank in system.decode if rank.busy)
        rank.crash()
        system.decode.remove(rank)
        await eventually(lambda: bool(found), "the answer")
        assert system.serving.cluster.migrations == 1
        await system.idle()
    assert found == expected


async def test_a_client_that_reads_late_gets_all_of_it() -> None:
    """Its socket is full for a while: then its text gathers, and comes as larger events."""
    count = 1500
    async with a_server(None) as (_, url):
        expected = text_of(await events(url, a_body(**CHAT, max_tokens=count)))
    writer = a_writer()
    async with a_server(writer, send_buffer=1 << 14) as (system, url):
        body = json.dumps(a_body(**CHAT, max_tokens=count)).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n"
        head += b"content-type: application/json\r\nconnection: close\r\n\r\n"
        port = int(url.split(":")[2].split("/")[0])
        with socket.socket() as client:
            client.setblocking(False)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, ("127.0.0.1", port))
            await loop.sock_sendall(client, head % len(body) + body)
            await eventually(lambda: writer.full > 0, "a full socket")
            await system.idle()  # the workers have not waited
            received = b""
            with anyio.fail_after(LONG_S):
                while part := await loop.sock_recv(client, 1 << 16):
                    received += part
    assert writer.full == 1
    assert text_of(events_of_chunks(received.partition(b"\r\n\r\n")[2])) == expected


async def test_a_gateway_without_descriptors_to_spare_does_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_descriptor: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    async with a_server(None) as (_, url):
        expected = await events(url, a_body(**CHAT))
    writer = a_writer()
    async with a_server(writer) as (_, url):
        monkeypatch.setattr("server.exchange.os.dup", refuse)
        assert await events(url, a_body(**CHAT)) == expected
        monkeypatch.undo()
    assert writer.written == 0


async def test_ticks_do_not_come_between() -> None:
    """They look whether a stream was quiet, for which the writer must give it back."""
    often = StreamTimes(early_headers_s=0.02, keep_alive_s=0.02, write_stall_s=0.02)
    async with a_server(None) as (_, url):
        expected = await events(url, a_body(**CHAT))
    writer = a_writer()
    async with a_server(writer, times=often) as (_, url):
        assert await events(url, a_body(**CHAT)) == expected
    assert writer.written > 0


def text_of(found: list[dict[str, Any]]) -> str:
    return "".join(
        choice["delta"].get("content", "") for event in found for choice in event["choices"]
    )


def events_of_chunks(body: bytes) -> list[dict[str, Any]]:
    data = b""
    while body:
        length, _, rest = body.partition(b"\r\n")
        data, body = data + rest[: int(length, 16)], rest[int(length, 16) + 2 :]
    lines = [line for line in data.decode().split("\n") if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]
