"""A load client for streams of server-sent events that costs little itself: raw sockets, no JSON.

Each of ``concurrency`` connections sends one request after the other. It knows as much of HTTP as
the benchmark needs: where the first event is, where an answer ends, and how many tokens it had.
"""

import asyncio
import itertools
import json
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import uvloop

CONTENT = re.compile(rb'"content": ?"[^"]')
END = b"data: [DONE]"
USAGE = re.compile(rb'"completion_tokens": ?(\d+)')


@dataclass(slots=True)
class Load:
    """What came of a phase. Times to the first token are in seconds, one a stream."""

    tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)
    wall_s: float = 0.0


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._answer: asyncio.Future[tuple[float, int]] | None = None
        self._first = 0.0
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's is no subclass

    async def ask(self, request: bytes) -> tuple[float, int]:
        """Seconds until the first token, and the number of tokens."""
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._first, self._tail = 0.0, b""
        sent = time.perf_counter()
        self._transport.write(request)
        first, tokens = await self._answer
        return first - sent, tokens

    def data_received(self, data: bytes) -> None:
        if not self._first and CONTENT.search(data):
            self._first = time.perf_counter()
        self._tail = self._tail[-1000:] + data
        if END in self._tail and self._tail.endswith(b"0\r\n\r\n"):
            usage = USAGE.search(self._tail)
            if usage is None:
                self._fail("an answer without usage")
            elif self._answer is not None and not self._answer.done():
                self._answer.set_result((self._first, int(usage[1])))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the connection was lost: {exc}, after {self._tail[-300:]!r}")

    def _fail(self, why: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(RuntimeError(why))


async def _load(
    url: str, bodies: Sequence[Mapping[str, object]], concurrency: int, rounds: int
) -> Load:
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    ).encode()
    payloads = [json.dumps(body).encode() for body in bodies]
    requests = itertools.cycle(
        b"%bContent-Length: %d\r\n\r\n%b" % (head, len(payload), payload) for payload in payloads
    )
    load = Load()
    loop = asyncio.get_running_loop()

    async def one() -> None:
        transport, connection = await loop.create_connection(_Connection, host, port)
        await asyncio.sleep(random.random() * 0.5)  # so that streams do not run in step
        for _ in range(rounds):
            first_token_s, tokens = await connection.ask(next(requests))
            load.first_token_s.append(first_token_s)
            load.tokens += tokens
        transport.close()

    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(concurrency):
            tasks.create_task(one())
    load.wall_s = time.perf_counter() - started
    return load


def run_load(
    url: str, bodies: Sequence[Mapping[str, object]], *, concurrency: int, rounds: int
) -> Load:
    """Run ``rounds`` streams on each of ``concurrency`` connections and wait for all of them. The
    requests' bodies are ``bodies``, one after the other and from the start again.
    """
    return uvloop.run(_load(url, bodies, concurrency, rounds))
