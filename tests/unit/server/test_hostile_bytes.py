"""Bytes that are no decent HTTP, on a real socket: refused or cut off, and nobody else notices."""

import json
import socket
from collections.abc import Iterator

import httpx
import pytest

from server.app import create_app
from server.settings import GatewaySettings, LimitSettings
from tests.support.generator import ScriptedGenerator
from tests.support.http_server import serve
from tests.support.model_text import byte_model_text

TEXT = byte_model_text()
PATH = b"/v1/chat/completions"
BODY = b'{"model":"tiny","messages":[{"role":"user","content":"hi"}],"max_tokens":2}'
HEAD = b"POST " + PATH + b" HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
LENGTH = b"content-length: %d\r\n\r\n" % len(BODY)
TIMEOUT_S = 20.0
HOSTILE = {
    "4000 headers": HEAD + b"".join(b"x-%d: 1\r\n" % i for i in range(4000)) + LENGTH + BODY,
    "a header of 60 KB": HEAD + b"x: " + b"a" * 60_000 + b"\r\n" + LENGTH + BODY,
    "a header of 5 MB": HEAD + b"x: " + b"a" * 5_000_000 + b"\r\n" + LENGTH + BODY,
    "a path of 100 KB": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    "a length of 5000 digits": HEAD + b"content-length: " + b"9" * 5000 + b"\r\n\r\n" + BODY,
    "a negative length": HEAD + b"content-length: -5\r\n\r\n" + BODY,
    "two lengths": HEAD + b"content-length: 3\r\n" + LENGTH + BODY,
    "a length and chunks": HEAD + b"transfer-encoding: chunked\r\n" + LENGTH + BODY,
    "broken chunks": HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\nhi\r\n0\r\n\r\n",
    "a chunk of 2**70": HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"4" + b"0" * 17 + b"\r\nhi",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 50,
    "a method of its own": b"BREW " + PATH + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    "a NUL in the path": b"GET /v1/\x00models HTTP/1.1\r\nhost: x\r\n\r\n",
    "a NUL in a header": HEAD + b"x: a\x00b\r\n" + LENGTH + BODY,
    "a path that climbs": b"GET /../../etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n",
    "another host's page": b"GET http://metadata.internal/latest HTTP/1.1\r\nhost: x\r\n\r\n",
    "a tunnel": b"CONNECT metadata.internal:80 HTTP/1.1\r\nhost: x\r\n\r\n",
    "a type that is no text": b"POST "
    + PATH
    + b" HTTP/1.1\r\nhost: x\r\ncontent-type: \xff\r\n"
    + LENGTH
    + BODY,
    "a body of another encoding": HEAD + b"content-encoding: zstd\r\n" + LENGTH + BODY,
    "text in UTF-16": HEAD
    + b"content-length: %d\r\n\r\n" % (2 * len(BODY) + 2)
    + BODY.decode().encode("utf-16"),
    "an upgrade": b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n",
}
ALLOWED = {400, 404, 405, 413, 415, 431}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    settings = GatewaySettings(limits=LimitSettings(body_timeout_s=0.5))
    with serve(create_app(ScriptedGenerator(text=TEXT), TEXT, settings)) as running:
        yield running


def first_line(url: str, sent: bytes) -> bytes:
    """Of the answer; empty where the connection was cut without one."""
    address = httpx.URL(url)
    received = b""
    with socket.create_connection((address.host, address.port or 0), TIMEOUT_S) as connection:
        try:
            connection.sendall(sent)
            while b"\r\n" not in received and (part := connection.recv(65536)):
                received += part
        except ConnectionError:
            pass  # it need not have read all of it
    return received.split(b"\r\n", 1)[0]


def answers(url: str) -> bool:
    headers = {"content-type": "application/json"}
    answer = httpx.post(url + PATH.decode(), content=BODY, headers=headers, timeout=TIMEOUT_S)
    return answer.status_code == httpx.codes.OK


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_get_an_error_or_nothing_and_others_are_served(url: str, name: str) -> None:
    line = first_line(url, HOSTILE[name])
    allowed = ALLOWED | ({200} if name == "an upgrade" else set())
    assert not line or int(line.split()[1]) in allowed, line
    assert answers(url)


def test_what_is_no_http_gets_the_usual_error(url: str) -> None:
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port or 0), TIMEOUT_S) as connection:
        connection.sendall(HOSTILE["a method of its own"])
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    head, body = received.split(b"\r\n\r\n", 1)
    assert b"content-type: application/json" in head
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_who_does_not_send_its_body_is_not_waited_for(url: str) -> None:
    assert first_line(url, HEAD + LENGTH + BODY[:-1]).split()[1] in (b"400", b"408")
    assert answers(url)


def test_requests_in_one_piece_are_answered_one_after_the_other(url: str) -> None:
    address = httpx.URL(url)
    received = b""
    with socket.create_connection((address.host, address.port or 0), TIMEOUT_S) as connection:
        connection.sendall((HEAD + LENGTH + BODY) * 2 + HEAD.replace(b"POST", b"GET") + b"\r\n")
        while received.count(b"HTTP/1.1 ") < 3 and (part := connection.recv(65536)):
            received += part
    statuses = [part[:3] for part in received.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"200", b"405"]
