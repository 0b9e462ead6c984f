"""What the gateway benchmark measures against: a direct mock, and the usual pass-through.

The mock answers with the same events at the same pace as the simulated workers make tokens. The
pass-through is FastAPI and httpx forwarding a stream, as many routers in Python do it.
"""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Mapping
from typing import cast

import httpx
import uvicorn
import uvloop
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from runtime.collector import spare_the_collector

MAX_TOKENS = re.compile(rb'"max_(?:completion_)?tokens": ?(\d+)')


def _chunk(payload: Mapping[str, object] | str) -> bytes:
    data = payload if isinstance(payload, str) else json.dumps(payload)
    event = f"data: {data}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(event), event)


def _event(text: str, finish: str | None = None) -> dict[str, object]:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return {"id": "mock", "object": "chat.completion.chunk", "model": "m", "choices": [choice]}


_SERVED = b'{"status": "ok", "model_path": "m", "data": [{"id": "m", "object": "model"}]}'
_ABOUT = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
    len(_SERVED),
    _SERVED,
)


class _Mock(asyncio.Protocol):
    """Streams ``max_tokens`` tokens for each request, the first after ``first_token_s``."""

    def __init__(self, first_token_s: float, step_s: float) -> None:
        self._first_token_s = first_token_s
        self._step_s = step_s
        self._received = b""
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator:
            return
        if head.startswith(b"GET "):  # a router asks whether this lives, and what it serves
            self._received = body
            assert self._transport is not None
            self._transport.write(_ABOUT)
            return
        if not head.startswith(b"POST "):  # or whether it speaks gRPC
            assert self._transport is not None
            self._transport.close()
            return
        length = re.search(rb"content-length: ?(\d+)", head, re.IGNORECASE)
        if length is None or len(body) < int(length[1]):
            return
        self._received = b""
        found = MAX_TOKENS.search(body)
        count = int(found[1]) if found else 1
        loop = asyncio.get_running_loop()
        loop.call_later(self._first_token_s, self._token, loop.time(), 0, count)

    def _token(self, started: float, index: int, count: int) -> None:
        assert self._transport is not None
        if self._transport.is_closing():
            return
        head = b""
        if index == 0:
            head = (
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                b"transfer-encoding: chunked\r\n\r\n"
            )
        if index + 1 < count:
            self._transport.write(head + _chunk(_event(" word")))
            due = started + self._first_token_s + (index + 1) * self._step_s
            asyncio.get_running_loop().call_at(due, self._token, started, index + 1, count)
            return
        last = _chunk(_event(" word", "length"))
        usage = {"choices": [], "usage": {"completion_tokens": count}}
        end = _chunk(usage) + _chunk("[DONE]") + b"0\r\n\r\n"
        self._transport.write(head + last + end)


def serve_mock(port: int, first_token_s: float, step_s: float) -> None:
    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: _Mock(first_token_s, step_s), "127.0.0.1", port, backlog=2048
        )
        await server.serve_forever()

    spare_the_collector()
    uvloop.run(serve())


def serve_pass_through(port: int, upstream: str) -> None:
    app = FastAPI()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    client = httpx.AsyncClient(limits=limits, timeout=None)

    @app.post("/v1/chat/completions")
    async def forward(request: Request) -> StreamingResponse:
        body = await request.body()
        headers = {"content-type": "application/json"}
        url = f"{upstream}/v1/chat/completions"
        onward = client.build_request("POST", url, content=body, headers=headers)
        answer = await client.send(onward, stream=True)

        async def events() -> AsyncGenerator[bytes]:
            async for data in answer.aiter_raw():
                yield data
            await answer.aclose()

        return StreamingResponse(events(), media_type="text/event-stream")

    uvicorn.run(
        app, host="127.0.0.1", port=port, loop="uvloop", http="httptools", log_level="warning"
    )
