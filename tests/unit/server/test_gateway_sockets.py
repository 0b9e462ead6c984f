"""What a gateway listens on, alone and beside others."""

import multiprocessing
import resource
import socket

import pytest

from protocol.errors import ConfigError
from server.gateway import allow_open_files, bound
from server.settings import GatewaySettings


def listening(sockets: list[socket.socket]) -> list[int]:
    """Their ports, once nobody else can have them by asking nicely."""
    for one in sockets:
        one.listen()
    return [one.getsockname()[1] for one in sockets]


def test_a_gateway_alone_does_not_share_its_port() -> None:
    with bound(GatewaySettings(port=0)) as sockets:
        (port,) = listening(sockets)
        with pytest.raises(ConfigError, match=f":{port}: "), bound(GatewaySettings(port=port)):
            pass


def test_several_gateways_share_a_port_and_each_may_have_one_of_its_own() -> None:
    with bound(GatewaySettings(port=0, processes=2)) as first, socket.socket() as free:
        (shared,) = listening(first)
        free.bind(("127.0.0.1", 0))
        settings = GatewaySettings(port=shared, processes=2, process_port=free.getsockname()[1])
        free.close()
        with bound(settings) as both:
            assert listening(both) == [shared, settings.process_port]
            with pytest.raises(ConfigError, match=f":{settings.process_port}: "), bound(settings):
                pass


@pytest.mark.parametrize("soft", [64, 256])
def test_a_gateway_may_open_as_many_files_as_it_can(soft: int) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as process:
        assert process.apply(limit_after, (soft, 256)) == 256


def limit_after(soft: int, hard: int) -> int:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    allow_open_files()
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
