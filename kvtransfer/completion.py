"""Waiting for what another thread or device completes, while the peer lives."""

import select
import socket
import time
from collections.abc import Callable

_SPINS = 64  # looks without a pause: most chunks are there within them
_PAUSE_S = 0.00005


def wait_until(
    done: Callable[[], bool], sock: socket.socket, stall_s: float, late: Exception
) -> None:
    """
    Raises:
        late: not done in ``stall_s``.
        OSError: not done, and the peer's end of ``sock`` has gone.
    """
    for _ in range(_SPINS):
        if done():
            return
    deadline = time.monotonic() + stall_s
    poller = select.poll()
    poller.register(sock, select.POLLRDHUP)
    while not done():
        if time.monotonic() > deadline:
            raise late
        if poller.poll(0) and not done():
            raise ConnectionResetError("the KV peer has gone")
        time.sleep(_PAUSE_S)
