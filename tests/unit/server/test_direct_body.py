"""Bodies that are written past ASGI's ``send``: the same bytes, on every kind of exchange."""

import socket

import pytest
from starlette.types import Receive, Scope, Send

from server.direct_body import EXTENSION
from tests.support.http_server import serve

PARTS = (b"one", b"two and a half", b"3" * 300)
HEAD = {"type": "http.response.start", "status": 200, "headers": [(b"x-a", b"b")]}


async def answer(scope: Scope, _receive: Receive, send: Send) -> None:
    """Writes directly where it can, and says in the last part how often it could."""
    direct = scope["extensions"][EXTENSION]
    assert not direct.write(b"too early")
    await send(HEAD)
    written = 0
    for part in PARTS:
        if scope["path"] == "/direct" and direct.write(part):
            written += 1
        else:
            await send({"type": "http.response.body", "body": part, "more_body": True})
    assert direct.write(b"") or scope["method"] == "HEAD"
    await send({"type": "http.response.body", "body": b"%d" % written, "more_body": False})
    assert not direct.write(b"too late")


def exchange(url: str, request: bytes) -> bytes:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request)
        received = b""
        while part := connection.recv(65536):
            received += part
    return received


@pytest.mark.parametrize(
    ("line", "written"),
    [(b"GET %b HTTP/1.1", 3), (b"GET %b HTTP/1.0", 3), (b"HEAD %b HTTP/1.1", 0)],
    ids=["1.1", "1.0", "HEAD"],
)
def test_the_bytes_are_those_that_send_would_have_sent(line: bytes, written: int) -> None:
    rest = b"\r\nhost: x\r\nconnection: close\r\n\r\n"
    with serve(answer) as url:
        direct = exchange(url, line % b"/direct" + rest)
        through_send = exchange(url, line % b"/send" + rest)
    after_date = [received.partition(b"x-a: b")[2] for received in (direct, through_send)]
    assert after_date[0].replace(b"1\r\n%d\r\n" % written, b"1\r\n0\r\n") == after_date[1]
    assert (PARTS[1] in direct) == (written > 0)


def test_the_next_request_on_the_connection_has_a_body_of_its_own() -> None:
    first = b"GET /direct HTTP/1.1\r\nhost: x\r\n\r\n"
    last = b"GET /direct HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    with serve(answer) as url:
        received = exchange(url, first + last)
    assert received.count(b"HTTP/1.1 200 OK") == 2
    assert received.count(b"1\r\n3\r\n0\r\n\r\n") == 2
