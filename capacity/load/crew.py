"""The worker processes of a load test, seen from the command.

Workers are started at once and live for the whole test. They end when their stdin closes, so a
command that is killed leaves none behind.
"""

import os
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from subprocess import PIPE

import anyio
import anyio.abc
import msgspec
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from capacity.load.errors import LoadError
from capacity.load.messages import LENGTH_BYTES, News, Order, Trouble, frame

_READ_BYTES = 1 << 18
_END_S = 5.0


class Crew:
    """``news`` is what all workers say, in order of arrival.

    Raises (from ``next_news``):
        LoadError: a worker has ended or cannot go on.
    """

    def __init__(
        self, processes: list[anyio.abc.Process], news: MemoryObjectReceiveStream[News]
    ) -> None:
        self._processes = processes
        self._news = news

    @property
    def size(self) -> int:
        return len(self._processes)

    async def order(self, worker: int, order: Order) -> None:
        stdin = self._processes[worker].stdin
        assert stdin is not None
        await stdin.send(frame(order))

    async def order_all(self, order: Order) -> None:
        for worker in range(self.size):
            await self.order(worker, order)

    async def next_news(self) -> News:
        news = await self._news.receive()
        if isinstance(news, Trouble):
            raise LoadError(f"load worker {news.worker}: {news.message}")
        return news


@asynccontextmanager
async def crew_of(size: int) -> AsyncGenerator[Crew]:
    processes: list[anyio.abc.Process] = []
    send, receive = anyio.create_memory_object_stream[News](1024)
    command = [sys.executable, "-m", "capacity.load.worker"]
    try:
        for _ in range(size):
            process = await anyio.open_process(
                command, stdin=PIPE, stdout=PIPE, stderr=None, start_new_session=True
            )
            processes.append(process)
        async with anyio.create_task_group() as tasks:
            for worker, process in enumerate(processes):
                tasks.start_soon(_read, worker, process, send)
            try:
                yield Crew(processes, receive)
            finally:
                tasks.cancel_scope.cancel()
    finally:
        send.close()
        receive.close()
        with anyio.move_on_after(_END_S, shield=True):
            for process in processes:
                if process.stdin is not None:
                    await process.stdin.aclose()
            for process in processes:
                await process.wait()
        for process in processes:
            if process.returncode is None:
                process.kill()


async def _read(
    worker: int, process: anyio.abc.Process, news: MemoryObjectSendStream[News]
) -> None:
    assert process.stdout is not None
    buffer = bytearray()
    decode = msgspec.msgpack.Decoder(News).decode
    while True:
        try:
            buffer += await process.stdout.receive(_READ_BYTES)
        except anyio.EndOfStream:
            code = await process.wait()
            await news.send(Trouble(worker=worker, message=f"it ended with code {code}"))
            return
        start = 0
        while len(buffer) - start >= LENGTH_BYTES:
            body = start + LENGTH_BYTES
            end = body + int.from_bytes(buffer[start:body], "big")
            if len(buffer) < end:
                break
            await news.send(decode(memoryview(buffer)[body:end]))
            start = end
        del buffer[:start]


def cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
