"""Waiting for what happens in another task or process, with a bound."""

import socket
from collections.abc import Callable
from urllib.parse import urlsplit

import anyio


async def eventually(condition: Callable[[], bool], what: str, *, timeout_s: float = 10.0) -> None:
    """Return when ``condition`` holds; fail, naming ``what``, when it does not come to hold."""
    with anyio.move_on_after(timeout_s):
        while not condition():  # noqa: ASYNC110  what is waited for is in another process or task
            await anyio.sleep(0.002)
        return
    raise AssertionError(f"not within {timeout_s} s: {what}")


async def port_free(address: str) -> None:
    """Return when ``tcp://host:port`` can be bound: ZeroMQ lets go of a port in its own time."""
    parts = urlsplit(address)

    def can_bind() -> bool:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((parts.hostname, parts.port))
            except OSError:
                return False
            return True

    await eventually(can_bind, f"{address} is free")
