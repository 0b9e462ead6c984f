"""The health check says which of a container's doors is closed."""

import socket
from collections.abc import Iterator

import pytest

from deploy.healthcheck import main
from tests.support.http_server import serve

HOST = "127.0.0.1"


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server((HOST, 0)) as listener:
        yield listener.getsockname()[1]


def a_closed_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_service_whose_ports_all_listen_is_healthy(port: int) -> None:
    assert main([str(port), str(port)], HOST) == 0


def test_one_closed_port_is_named(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    closed = str(a_closed_port())
    assert main([str(port), closed], HOST) == 1
    assert capsys.readouterr().err.startswith(f"{closed}: ")


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_a_url_is_healthy_when_it_answers_well(status: int, code: int) -> None:
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    with serve(app) as url:
        assert main([f"{url}/health"], HOST) == code


@pytest.mark.parametrize("targets", [[], ["8000x"], ["file:///etc/passwd"]])
def test_what_is_neither_port_nor_url_is_wrong_usage(targets: list[str]) -> None:
    assert main(targets, HOST) == 2
