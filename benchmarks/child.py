"""A Python function in a process of its own, and waiting until it listens."""

import multiprocessing
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

import psutil

READY_WITHIN_S = 60.0


@contextmanager
def child(target: Callable[..., None], *args: object) -> Generator[psutil.Process]:
    process = multiprocessing.get_context("spawn").Process(target=target, args=args, daemon=True)
    process.start()
    try:
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.join(5.0)
        process.kill()


def wait_for_port(port: int) -> None:
    until = time.monotonic() + READY_WITHIN_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return
