"""uvicorn on a real socket in a thread, as the gateway runs it."""

import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from server.exchange import exchange_protocol

DEADLINE_S = 10.0


def eventually(condition: object, *, within_s: float = DEADLINE_S) -> bool:
    """Poll a callable until it holds; False when it never does."""
    assert callable(condition)
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@contextmanager
def serve(app: ASGIApp) -> Generator[str]:
    """The base URL of ``app`` while the block runs."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, log_config=None, lifespan="off", loop="uvloop", http=exchange_protocol()
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        assert eventually(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)
        listener.close()
    assert not thread.is_alive(), "a request kept the server from stopping"
