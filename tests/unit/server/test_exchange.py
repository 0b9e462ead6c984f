"""Writing past ASGI's ``send``: the same bytes, on every kind of exchange."""

import asyncio
import os
import socket
import time
from typing import Any

import anyio
import httpx
import pytest
from starlette.types import Receive, Scope, Send

from server.exchange import exchange_of, finish_at_once
from server.turn_transport import Turn, TurnTransport
from tests.support.http_server import eventually, serve

PARTS = (b"one", b"two and a half", b"3" * 300)
HEAD = {"type": "http.response.start", "status": 200, "headers": [(b"x-a", b"b")]}


async def answer(scope: Scope, _receive: Receive, send: Send) -> None:
    exchange = exchange_of(scope, send)
    assert exchange.clear
    finish_at_once(send(HEAD))
    for part in PARTS:
        if scope["path"] == "/direct":
            exchange.write(part)
        else:
            await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def exchange(url: str, request: bytes) -> bytes:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request)
        received = b""
        while part := connection.recv(65536):
            received += part
    return received


@pytest.mark.parametrize(
    ("line", "has_body"),
    [(b"GET %b HTTP/1.1", True), (b"GET %b HTTP/1.0", True), (b"HEAD %b HTTP/1.1", False)],
    ids=["1.1", "1.0", "HEAD"],
)
def test_the_bytes_are_those_that_send_would_have_sent(line: bytes, has_body: bool) -> None:
    rest = b"\r\nhost: x\r\nconnection: close\r\n\r\n"
    with serve(answer) as url:
        direct = exchange(url, line % b"/direct" + rest)
        through_send = exchange(url, line % b"/send" + rest)
    assert direct.partition(b"x-a: b")[2] == through_send.partition(b"x-a: b")[2] != b""
    assert (PARTS[1] in direct) == has_body


async def lending(scope: Scope, _receive: Receive, send: Send) -> None:
    """The same answer; the part in the middle past the exchange, where that can be had."""
    exchange = exchange_of(scope, send)
    recalled: list[str] = []

    def recall() -> None:
        recalled.append("yes")
        exchange.end_loan(b"", wrote=True)

    assert exchange.lend(recall) is None  # the body has not begun
    finish_at_once(send(HEAD))
    exchange.write(PARTS[0])
    assert exchange.lend(recall) is None  # that has not left yet
    await anyio.sleep(0.05)
    descriptor = exchange.lend(recall)
    if descriptor is None:
        exchange.write(PARTS[1])
    else:
        assert exchange.lend(recall) is None  # to one at a time
        os.write(descriptor, b"%x\r\n%b\r\n" % (len(PARTS[1]), PARTS[1]))
    exchange.write(PARTS[2])
    assert len(recalled) == (descriptor is not None)
    assert not exchange.has_been_quiet()
    assert exchange.has_been_quiet()
    assert (descriptor is not None) == (scope["path"] == "/lends")
    await send({"type": "http.response.body", "body": b"", "more_body": False})


@pytest.mark.parametrize(
    ("line", "path"),
    [
        (b"GET %b HTTP/1.1", b"/lends"),
        (b"GET %b HTTP/1.0", b"/lends"),  # in chunks, as uvicorn sends it to these too
        (b"HEAD %b HTTP/1.1", b"/no-body"),
    ],
    ids=["1.1", "1.0", "HEAD"],
)
def test_a_socket_is_lent_once_all_has_left(line: bytes, path: bytes) -> None:
    rest = b"\r\nhost: x\r\nconnection: close\r\n\r\n"
    with serve(lending) as url:
        lent = exchange(url, line % path + rest)
    with serve(answer) as url:
        expected = exchange(url, line % b"/send" + rest)
    assert lent.partition(b"x-a: b")[2] == expected.partition(b"x-a: b")[2] != b""


def test_a_client_that_hangs_up_ends_the_loan() -> None:
    ended: list[bool] = []

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        exchange = exchange_of(scope, send)
        finish_at_once(send(HEAD))
        exchange.write(PARTS[0])
        await anyio.sleep(0.05)

        def recall() -> None:
            assert descriptor is not None
            os.fstat(descriptor)  # still ours, and no other connection's
            exchange.end_loan(b"", wrote=False)
            ended.append(exchange.lost)

        descriptor = exchange.lend(recall)
        exchange.listen(lambda: None)
        with anyio.fail_after(10):
            while not exchange.lost:  # noqa: ASYNC110  uvicorn tells it by no event
                await anyio.sleep(0.01)

    with serve(app) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            connection.recv(100)
            time.sleep(0.2)
        assert eventually(lambda: bool(ended))
    assert ended == [False]


def test_what_is_written_in_one_turn_is_sent_in_one_piece() -> None:
    async def scenario() -> list[bytes]:
        sent: list[bytes] = []

        class Peer(asyncio.Protocol):
            def data_received(self, data: bytes) -> None:
                sent.append(data)

            def connection_lost(self, exc: Exception | None) -> None:
                closed.set()

        closed = anyio.Event()
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
        await loop.create_connection(Peer, sock=theirs)
        turn = TurnTransport(transport, loop, Turn())
        for part in PARTS:
            turn.write(part)
        assert sent == []
        with anyio.fail_after(10):
            while not sent:
                await anyio.lowlevel.checkpoint()
            turn.write(b"last ")
            turn.write(b"words")
            turn.close()
            turn.write(b"too late")
            await closed.wait()
        return sent

    assert anyio.run(scenario) == [b"".join(PARTS), b"last words"]


def test_a_connection_that_cannot_send_keeps_nothing_from_the_others() -> None:
    class Broken(asyncio.Transport):
        def is_closing(self) -> bool:
            return False

        def write(self, data: Any) -> None:
            raise OSError("broken")

    async def scenario() -> bytes:
        loop = asyncio.get_running_loop()
        failures: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _loop, failure: failures.append(failure))
        turn = Turn()
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        whole, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
        for transport in (Broken(), whole):
            TurnTransport(transport, loop, turn).write(b"text")
        try:
            with anyio.fail_after(10):
                return await loop.sock_recv(theirs, 100)
        finally:
            assert len(failures) == 1
            whole.close()
            theirs.close()

    assert anyio.run(scenario) == b"text"


def test_requests_on_one_connection_have_bodies_of_their_own() -> None:
    first = b"GET /direct HTTP/1.1\r\nhost: x\r\n\r\n"
    last = b"GET /direct HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    with serve(answer) as url:
        received = exchange(url, first + last)
    assert received.count(b"HTTP/1.1 200 OK") == 2
    assert received.count(PARTS[2] + b"\r\n0\r\n\r\n") == 2


@pytest.mark.parametrize("requests", [1, 2], ids=["one", "pipelined"])
def test_a_client_that_goes_is_noticed_and_writing_to_it_is_harmless(requests: int) -> None:
    seen: list[bool] = []

    async def wait(scope: Scope, _receive: Receive, send: Send) -> None:
        exchange = exchange_of(scope, send)
        await send(HEAD)
        changed = anyio.Event()
        exchange.listen(changed.set)
        seen.append(exchange.lost)
        await changed.wait()
        exchange.write(b"to nobody")
        seen.append(exchange.lost)

    with serve(wait) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * requests)
            assert eventually(lambda: seen == [False])
        assert eventually(lambda: seen[:2] == [False, True])


def test_a_client_that_is_behind_is_noticed_and_so_is_its_catching_up() -> None:
    told: list[bool] = []
    large = b"x" * 2**24

    async def push(scope: Scope, _receive: Receive, send: Send) -> None:
        exchange = exchange_of(scope, send)
        await send(HEAD)
        exchange.write(large)
        caught_up = anyio.Event()
        exchange.listen(caught_up.set)
        told.append(exchange.clear)
        await caught_up.wait()
        told.append(exchange.clear)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    with serve(push) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert eventually(lambda: told == [False])
            received = b"".join(iter(lambda: connection.recv(2**20), b""))
    assert told == [False, True]
    assert received.endswith(large + b"\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET / HTTP/1.1\r\nx-slow: ", b"GET /send HTTP/1.1\r\nhost: x\r\n\r\nGET"],
    ids=["nothing", "half a head", "half of the second head"],
)
def test_who_does_not_say_what_they_want_is_cut_off(
    sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.exchange.HEAD_WITHIN_S", 0.2)
    with serve(answer) as url:
        received = exchange(url, sent)
    assert received.count(b"HTTP/1.1 200 OK") == sent.count(b"/send")


def test_an_answer_before_the_whole_body_has_come_is_not_lost() -> None:
    body = b"x" * 2**23
    with serve(answer) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"POST /send HTTP/1.1\r\nhost: x\r\n")
            connection.sendall(b"content-length: %d\r\n\r\n" % len(body) + body)  # and only then
            received = connection.recv(65536)
            connection.sendall(b"GET /send HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            received += b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.count(b"HTTP/1.1 200 OK") == 2


@pytest.mark.parametrize("http", [b"1.1", b"1.0"])
def test_an_answer_that_ends_the_connection_is_not_lost_either(http: bytes) -> None:
    body = b"x" * 2**23
    head = b"POST /send HTTP/%b\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
    with serve(answer) as url:
        received = exchange(url, head % (http, len(body)) + body)
    assert received.count(b"HTTP/1.1 200 OK") == 1
    assert received.endswith(PARTS[2] + b"\r\n0\r\n\r\n")


def test_what_comes_after_the_last_answer_of_a_connection_is_not_answered() -> None:
    head = b"POST /send HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 9\r\n\r\n"
    with serve(answer) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(head)
            received = b"".join(iter(lambda: connection.recv(65536), b""))
            connection.sendall(b"x" * 9 + b"GET /send HTTP/1.1\r\nhost: x\r\n\r\n" + b"\0" * 100)
            connection.shutdown(socket.SHUT_WR)
            received += b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("more", [b"", b"connection: close\r\n"], ids=["kept", "closed"])
def test_a_body_without_end_is_cut_off_once_it_has_its_answer(
    more: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.exchange.REST_WITHIN_S", 0.2)
    head = b"POST /send HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n"
    received, cut = b"", False
    with serve(answer) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(head + more + b"\r\n2\r\nhi\r\n")
            while b"\r\n0\r\n\r\n" not in received:
                received += connection.recv(65536)

            def is_cut() -> bool:
                try:
                    connection.sendall(b"2\r\nhi\r\n")
                except ConnectionError:
                    return True
                return False

            cut = eventually(is_cut)
    assert received.count(b"HTTP/1.1 200 OK") == 1
    assert cut


@pytest.mark.parametrize(
    "more", [b"", b"\r\n", b"GET"], ids=["nothing more", "a line end", "half a head"]
)
def test_who_has_said_what_they_want_may_wait_for_it(
    more: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.exchange.HEAD_WITHIN_S", 0.05)

    async def slow(_scope: Scope, _receive: Receive, send: Send) -> None:
        await anyio.sleep(0.3)  # several times what a head may take
        await send(HEAD)
        await send({"type": "http.response.body", "body": b"at last", "more_body": False})

    with serve(slow) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" + more)
            received = b""
            while b"at last" not in received:
                part = connection.recv(65536)
                assert part, "the connection was cut before the answer"
                received += part


def test_under_another_server_the_body_is_the_same() -> None:
    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(app=answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/direct")

    assert anyio.run(get).content == b"".join(PARTS)


def test_a_layer_that_waits_in_send_is_an_error() -> None:
    async def scenario() -> None:
        with pytest.raises(RuntimeError, match="waits in send"):
            finish_at_once(anyio.lowlevel.checkpoint())

    anyio.run(scenario)
