"""Clients that leave at random moments, and what is left of them: nothing."""

import asyncio
import json
import os
import random
import socket
import struct
from collections.abc import Generator
from contextlib import contextmanager

import anyio
import pytest

from tests.support.arithmetic import MODEL
from tests.support.gateway import a_gateway, a_writer
from tests.support.polling import eventually
from tests.support.system import a_system
from tests.support.workers import Pace

pytestmark = pytest.mark.anyio
AT_ONCE = 100
RANKS = 2
PACE = Pace(first_token_s=0.02, step_s=0.005)
BLOCKS = 250  # for about half of those who are there at once: the others wait in line
TOKENS = 60
LONGEST_S = 0.6  # a client stays at most so long, which is about as long as an answer takes
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("clients", [60, pytest.param(2000, marks=pytest.mark.slow)])
async def test_clients_that_hang_up_at_any_moment_leave_nothing_behind(clients: int) -> None:
    async with (
        a_system(
            ranks=RANKS,
            num_blocks=BLOCKS,
            max_waiting=AT_ONCE,
            pace=PACE,
            writer=a_writer(),
        ) as system,
        a_gateway(system) as (port, server),
    ):
        for number in range(5):  # whatever is made once, by the first who ask, is there now
            await a_client(port, random.Random(number), stays=True)
        await system.idle()
        connections = server.server_state.connections
        await eventually(lambda: not connections, "nobody is connected")
        before = held()
        moments = [random.Random(number) for number in range(clients)]
        limit = anyio.CapacityLimiter(AT_ONCE)

        async def one(rng: random.Random) -> None:
            async with limit:
                await a_client(port, rng, stays=False)

        async with anyio.create_task_group() as tasks:
            for rng in moments:
                tasks.start_soon(one, rng)
        await eventually(lambda: held() == before, f"{before} tasks and files again")
        await system.idle()
        assert system.serving.cluster.waiting_requests == 0
        assert all(rank.reservations > clients // 50 for rank in system.decode)
        assert any(rank.cancelled for rank in system.decode)
        await a_client(port, random.Random(0), stays=True)


def held() -> tuple[int, int]:
    """Tasks of this loop, and open files of this process: the clients' own have ended."""
    return len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))


async def a_client(port: int, rng: random.Random, *, stays: bool) -> None:
    """Sends a request, or only the beginning of one, reads for a while and goes. One that stays
    must get the whole answer.
    """
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "x " * rng.randrange(1, 200)}],
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stream": stays or rng.random() < 0.8,
        "n": 1 if stays else rng.choice((1, 1, 1, 3)),
    }
    content = json.dumps(body).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    request = head + b"content-length: %d\r\n\r\n" % len(content) + content
    if not stays and rng.random() < 0.2:
        request = request[: rng.randrange(len(request))]
    with a_socket() as connection:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, ("127.0.0.1", port))
        await loop.sock_sendall(connection, request)
        received = b""
        with anyio.move_on_after(30.0 if stays else rng.random() * LONGEST_S):
            while part := await loop.sock_recv(connection, 65536):
                received += part
                if stays and received.endswith(b"0\r\n\r\n"):
                    break
        if stays:
            assert b"data: [DONE]" in received
        elif rng.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


@contextmanager
def a_socket() -> Generator[socket.socket]:
    with socket.socket() as connection:
        connection.setblocking(False)
        yield connection
