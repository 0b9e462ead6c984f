"""Writing a response's body without a coroutine: uvicorn's HTTP protocol with one thing added.

Through ASGI every event costs a message, a coroutine, and the same again in each layer around the
application; with thousands of tokens a second that was half of the gateway's time. Here the
application finds a ``DirectBody`` in ``scope["extensions"][EXTENSION]``.

Invariant: a direct write sends the bytes that ASGI's ``send`` would have sent, or none.
"""

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

EXTENSION = "headrace.direct_body"


class DirectBody:
    """The body of one response. Start and end the response with ``send``."""

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    def write(self, data: bytes) -> bool:
        """Send ``data`` as the next part of the body; False if ``send`` has to do it.

        That is so before the response has started and after its end, while the client does not
        keep up with what was sent before, and for answers without chunks, such as HEAD's.
        """
        cycle = self._cycle
        if (
            not cycle.chunked_encoding
            or cycle.flow.write_paused
            or cycle.disconnected
            or cycle.response_complete
        ):
            return False
        if data:  # an empty chunk would end the body
            cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True


class DirectHttpProtocol(HttpToolsProtocol):
    """For ``uvicorn.Config(http=...)``."""

    def on_headers_complete(self) -> None:
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:  # else it is an upgrade, which is no request
            extensions: dict[str, Any] = self.scope.setdefault("extensions", {})
            extensions[EXTENSION] = DirectBody(self.cycle)
