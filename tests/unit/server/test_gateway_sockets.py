"""What a gateway listens on, alone and beside others."""

import socket

import pytest

from protocol.errors import ConfigError
from server.gateway import bound
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
