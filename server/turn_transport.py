"""A connection that sends once in a turn of the event loop, however often it is written to.

A send costs more than all else that a token costs here. A gateway that has fallen behind finds
the frames of several steps in one turn; what they hold for one client then leaves in one piece, and
the gateway catches up. Likewise a response's head leaves with its first event.

Invariant: bytes leave in the order in which they were written, before the connection is closed.
"""

from asyncio import AbstractEventLoop, BaseProtocol, BaseTransport, Transport
from typing import Any, cast

_LARGE_BYTES = 16_384  # not worth a copy to join it to others; and the writer learns who is behind


class TurnTransport(Transport):
    """Stands before the event loop's own transport, for the protocol that is connected to it."""

    def __init__(self, transport: BaseTransport, loop: AbstractEventLoop) -> None:
        super().__init__()
        self._transport = cast("Transport", transport)  # uvloop's is no subclass
        self._at_end_of_turn = loop.call_soon
        self._parts: list[bytes] = []

    def write(self, data: Any) -> None:
        """Send ``data``, which must not change any more, with what else is written this turn."""
        if not self._parts:
            self._at_end_of_turn(self._send)
        self._parts.append(data)
        if len(data) > _LARGE_BYTES:
            self._send()

    def _send(self) -> None:
        parts = self._parts
        if parts and not self._transport.is_closing():
            self._transport.write(parts[0] if len(parts) == 1 else b"".join(parts))
        parts.clear()

    def close(self) -> None:
        self._send()
        self._transport.close()

    def abort(self) -> None:
        self._parts.clear()
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

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
