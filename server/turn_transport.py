"""Connections that send once in a turn of the event loop, however often they are written to.

A send costs more than all else that a token costs here. A gateway that has fallen behind finds
the frames of several steps in one turn; what they hold for one client then leaves in one piece, and
the gateway catches up. Likewise a response's head leaves with its first event.

Invariant: bytes leave in the order in which they were written, before the connection is closed,
and a peer that is still sending then does not lose them.
"""

from asyncio import AbstractEventLoop, BaseProtocol, BaseTransport, Transport
from collections import deque
from typing import Any, cast

_LARGE_BYTES = 16_384  # not worth a copy to join it to others; and the writer learns who is behind


class Turn:
    """The connections of one event loop that have something to send when its turn ends: one call
    for all of them, because 64 calls of the loop take longer than the text of 64 tokens.
    """

    def __init__(self) -> None:
        self._waiting: deque[TurnTransport] = deque()

    def ends_for(self, transport: "TurnTransport", loop: AbstractEventLoop) -> None:
        if not self._waiting:
            loop.call_soon(self._end, loop)
        self._waiting.append(transport)

    def _end(self, loop: AbstractEventLoop) -> None:
        try:
            while self._waiting:
                self._waiting.popleft().send()
        finally:
            if self._waiting:  # one connection's failure is not the others'
                loop.call_soon(self._end, loop)


class TurnTransport(Transport):
    """Stands before the event loop's own transport, for the protocol that is connected to it."""

    def __init__(self, transport: BaseTransport, loop: AbstractEventLoop, turn: Turn) -> None:
        super().__init__()
        self._transport = cast("Transport", transport)  # uvloop's is no subclass
        self._loop = loop
        self._turn = turn
        self._parts: list[bytes] = []
        self.linger_s = 0.0  # not 0 while the peer is expected to send more
        self.lingers = False  # closed, and what still comes is to be ignored

    def write(self, data: Any) -> None:
        """Send ``data``, which must not change any more, with what else is written this turn."""
        if not self._parts:
            self._turn.ends_for(self, self._loop)
        self._parts.append(data)
        if len(data) > _LARGE_BYTES:
            self.send()

    def send(self) -> None:
        """Send what has been written, now."""
        parts = self._parts
        if not parts:
            return
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        if not self.is_closing():
            self._transport.write(data)

    def idle_descriptor(self) -> int | None:
        """The socket's, while all that was written has left; None if not, or if bytes written to
        it would not reach the peer as they are (TLS).
        """
        transport = self._transport
        if self._parts or self.is_closing() or transport.get_write_buffer_size():
            return None
        if transport.get_extra_info("sslcontext") is not None:
            return None
        return int(transport.get_extra_info("socket").fileno())

    def close(self) -> None:
        """Closed with something unread, the peer's side would be reset, and it could lose what it
        has been sent. So a peer that is expected to send more is still read from, for ``linger_s``
        or until it closes. A second call closes at once.
        """
        self.send()
        if not self.linger_s or self.is_closing():
            self._transport.close()
            return
        self.lingers = True
        self._transport.write_eof()
        self._transport.resume_reading()
        self._loop.call_later(self.linger_s, self._transport.close)

    def abort(self) -> None:
        self._parts.clear()
        self._transport.abort()

    def is_closing(self) -> bool:
        return self.lingers or self._transport.is_closing()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def is_reading(self) -> bool:
        return self._transport.is_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def set_protocol(self, protocol: BaseProtocol) -> None:
        self._transport.set_protocol(protocol)

    def get_protocol(self) -> BaseProtocol:
        return self._transport.get_protocol()
