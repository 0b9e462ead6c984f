"""A two-sided communicator over a socket pair, and blocks in host memory: no tags, order is all."""

import socket
import threading
from collections.abc import Callable

from kvtransfer.interface import KVMemory
from kvtransfer.pages import HostPages


class StagedHostPages(HostPages):
    """``StagedPages`` whose copies are over when they return."""

    def __init__(self, memory: KVMemory) -> None:
        super().__init__(memory)
        self.events: list[object] = []

    def staging(self, num_bytes: int) -> memoryview:
        return memoryview(bytearray(num_bytes))

    def after(self, ready: object) -> None:
        self.events.append(ready)


class SocketCommunicator:
    """One of two ranks. A posted operation runs in a thread, as on a stream; each waits for the one
    before it, and none can be taken back but by ``abort``.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._last: threading.Thread | None = None
        self._failed = False
        self.aborted = False

    def post_send(self, row: memoryview, num_bytes: int) -> Callable[[], bool]:
        return self._post(lambda: self._sock.sendall(row[:num_bytes]))

    def post_receive(self, row: memoryview, num_bytes: int) -> Callable[[], bool]:
        def receive() -> None:
            got = 0
            while got < num_bytes:
                part = self._sock.recv_into(row[got:num_bytes])
                if not part:
                    raise ConnectionResetError("the other rank has gone")
                got += part

        return self._post(receive)

    def queued(self) -> Callable[[], bool]:
        return self._over

    def abort(self) -> None:
        if not self.aborted:
            self.aborted = True
            self._sock.shutdown(socket.SHUT_RDWR)
            self._sock.close()

    def _post(self, operation: Callable[[], None]) -> Callable[[], bool]:
        before = self._last

        def run() -> None:
            if before is not None:
                before.join()
            try:
                operation()
            except OSError:
                self._failed = True

        self._last = threading.Thread(target=run, daemon=True)
        self._last.start()
        return self._over

    def _over(self) -> bool:
        if self._last is not None and self._last.is_alive():
            return False
        if self._failed:
            raise ConnectionResetError("the communicator has been aborted")
        return True
