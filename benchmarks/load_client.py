"""What the load-test client costs for each chunk of a stream, beside the openai and httpx clients.

    python -m benchmarks.load_client [--json] [--quick]

A raw asyncio server in a process of its own writes canned events: 256 streams at a time, one event
each every 10 ms, so that nearly every event is a read of its own, as with an engine that steps. In
a second case it writes as fast as the client reads. Each client runs in a process of its own on the
same streams. CPU is user and system time of the client's process; chunks per second of one core are
their number divided by that. httpx reads lines and parses JSON, as scripts do; openai is asked for
a stream and iterated. Start-up is the time from ``headrace bench`` until a server has the first
request of its load, after those with which it looks at the server.
"""

import argparse
import asyncio
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import cast

import httpx
import openai
import uvloop

from benchmarks.child import child, wait_for_port
from benchmarks.local_system import free_port
from benchmarks.report import Bar, print_report
from capacity.load.address import parse_address
from capacity.load.api import Api
from capacity.load.client import Client
from capacity.load.records import Record
from capacity.load.worker import collect_seldom
from tests.support.scripted_server import Script, scripted_server
from tests.support.two_sides import command

LENGTH = re.compile(rb"content-length: ?(\d+)")
STREAMS = 256
STEP_S = 0.01
CHUNKS_PER_CORE_SECOND = 100_000
START_UP_S = 1.0
STARTS = 3
EVENT = json.dumps(
    {
        "id": "chatcmpl-0123456789abcdef01234567",
        "object": "chat.completion.chunk",
        "created": 1_750_000_000,
        "model": "canned",
        "choices": [
            {"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}
        ],
    },
    separators=(",", ":"),
)
HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def framed(data: str) -> bytes:
    event = f"data: {data}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(event), event)


CHUNK = framed(EVENT)
END = framed('{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":1}}') + framed("[DONE]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """``step_s`` 0: as fast as the connection takes it."""

    chunks: int
    step_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    chunks: int
    cpu_s: float
    wall_s: float


# -- the server ------------------------------------------------------------------------------------


class _Canned(asyncio.Protocol):
    """Every POST gets as many events as it asks tokens; the pause between them is the model."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._received = b""
        self._left = 0
        self._step_s = 0.0
        self._paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        if not blank or len(body) < int(LENGTH.search(head.lower())[1]):  # type: ignore[index]
            return  # some clients send the body in a segment of its own
        self._received = b""
        asked = json.loads(body)
        self._left, self._step_s = asked["max_tokens"], float(asked["model"])
        assert self._transport is not None
        self._transport.write(HEAD)
        self._step(asyncio.get_running_loop().time())

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if not self._step_s:
            self._step(0.0)

    def _step(self, due: float) -> None:
        transport = self._transport
        assert transport is not None
        if transport.is_closing() or self._left < 0:
            return
        if self._left == 0:
            transport.write(END + b"0\r\n\r\n")
            self._left = -1
            return
        transport.write(CHUNK)
        self._left -= 1
        loop = asyncio.get_running_loop()
        if self._step_s:
            loop.call_at(due + self._step_s, self._step, due + self._step_s)
        elif not self._paused:
            loop.call_soon(self._step, due)


def serve_canned(port: int) -> None:
    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(_Canned, "127.0.0.1", port, backlog=2048)
        await server.serve_forever()

    uvloop.run(serve())


# -- the clients: each reads one stream and says how many chunks it had ---------------------------

Stream = Callable[[Case], Awaitable[int]]


def ours(url: str) -> Stream:
    client = Client(parse_address(url), Api(endpoint="chat", model=""), timeout_s=120.0)
    indices = iter(range(1 << 30))

    async def stream(case: Case) -> int:
        api = Api(endpoint="chat", model=str(case.step_s), exact_length=False)
        request = client.request(api.body("hello", case.chunks))
        record = Record(index=next(indices), stage=0, intended_ns=time.monotonic_ns())
        await client.ask(request, record)
        if record.error:
            raise RuntimeError(f"{record.error}: {record.message}")
        return len(record.chunks_ns)

    return stream


def with_httpx(url: str) -> Stream:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    client = httpx.AsyncClient(base_url=url, limits=limits, timeout=120.0, trust_env=False)

    async def stream(case: Case) -> int:
        count = 0
        async with client.stream("POST", "/v1/chat/completions", json=_asked(case)) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[6:])["choices"]
                    count += bool(choices and choices[0]["delta"]["content"])
        return count

    return stream


def with_openai(url: str) -> Stream:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120.0)

    async def stream(case: Case) -> int:
        count = 0
        chunks = await client.chat.completions.create(
            model=str(case.step_s),
            max_tokens=case.chunks,
            stream=True,
            messages=[{"role": "user", "content": "hello"}],
        )
        async for chunk in chunks:
            count += bool(chunk.choices and chunk.choices[0].delta.content)
        return count

    return stream


CLIENTS = {"headrace": ours, "httpx": with_httpx, "openai": with_openai}


def _asked(case: Case) -> dict[str, object]:
    messages = [{"role": "user", "content": "hello"}]
    return {
        "model": str(case.step_s),
        "max_tokens": case.chunks,
        "stream": True,
        "messages": messages,
    }


def read_streams(name: str, url: str, case: Case, rounds: int) -> Cost:
    """The cost of ``rounds`` streams on each of ``STREAMS`` connections, after one to warm up."""

    async def all_of(count: int, stream: Stream, case: Case) -> int:
        async def one() -> int:
            return sum([await stream(case) for _ in range(count)])

        return sum(await asyncio.gather(*(one() for _ in range(STREAMS))))

    async def measure() -> Cost:
        stream = CLIENTS[name](url)
        await all_of(1, stream, Case(chunks=2, step_s=case.step_s))
        if name == "headrace":
            collect_seldom()  # as its load processes do
        cpu, wall = time.process_time(), time.perf_counter()
        chunks = await all_of(rounds, stream, case)
        return Cost(
            chunks=chunks,
            cpu_s=time.process_time() - cpu,
            wall_s=time.perf_counter() - wall,
        )

    return uvloop.run(measure())


def start_up_s() -> float:
    """The median of a few starts."""
    found = []
    for _ in range(STARTS):
        with (
            tempfile.TemporaryDirectory(prefix="headrace-") as folder,
            scripted_server(Script(first_token_s=0.001, token_s=0.001)) as server,
        ):
            begin_ns = time.monotonic_ns()
            subprocess.run(
                command(server.url, Path(folder), "--concurrency", "1", "--requests", "1"),
                check=False,
                capture_output=True,
            )
            found.append((server.generations[0].arrived_ns - begin_ns) / 1e9)
    return median(found)


@contextmanager
def canned_server() -> Generator[str]:
    port = free_port()
    with child(serve_canned, port):
        wait_for_port(port)
        yield f"http://127.0.0.1:{port}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print only the line of JSON")
    parser.add_argument("--quick", action="store_true", help="a tenth of the chunks")
    chosen = parser.parse_args()
    cases = {
        "steps": Case(chunks=50 if chosen.quick else 300, step_s=STEP_S),
        "flood": Case(chunks=100 if chosen.quick else 1000, step_s=0.0),
    }
    figures: dict[str, float] = {}
    spawn = multiprocessing.get_context("spawn")
    with canned_server() as url:
        for case_name, case in cases.items():
            for name in CLIENTS:
                rounds = 4 if name == "headrace" else 1
                with ProcessPoolExecutor(1, spawn) as process:
                    cost = process.submit(read_streams, name, url, case, rounds).result()
                expected = STREAMS * case.chunks * rounds
                if cost.chunks != expected:
                    raise RuntimeError(f"{name} saw {cost.chunks} chunks of {expected}")
                key = f"{case_name}_{name}"
                figures[f"{key}_cpu_ms_per_1000_chunks"] = round(1e6 * cost.cpu_s / cost.chunks, 2)
                figures[f"{key}_chunks_per_core_second"] = round(cost.chunks / cost.cpu_s)
                figures[f"{key}_chunks_per_second"] = round(cost.chunks / cost.wall_s)
    bars = [
        Bar(
            f"chunks per second of one core, {case}",
            figures[f"{case}_headrace_chunks_per_core_second"],
            at_least=CHUNKS_PER_CORE_SECOND,
        )
        for case in cases
    ]
    figures["start_up_s"] = round(start_up_s(), 3)
    bars.append(Bar("seconds to the first request", figures["start_up_s"], at_most=START_UP_S))
    return print_report("load_client", figures, bars, only_json=chosen.json)


if __name__ == "__main__":
    sys.exit(main())
