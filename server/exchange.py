"""The client's side of one HTTP exchange, for an application that writes without waiting.

Through ASGI every event costs a message and a coroutine, and the same again in each layer around
the application; noticing a hang-up costs a task. With thousands of tokens a second that was most
of the gateway's time. Here uvicorn's protocol puts an ``Exchange`` into the scope, which calls
back instead.

Invariant: what is written is sent as uvicorn's own ``send`` would have sent it, and in one piece
with what else is written to the connection in that turn of the event loop.
"""

import os
from asyncio import BaseTransport, TimerHandle
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Protocol

from starlette.types import Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.openai.errors import HttpError, describe
from server.turn_transport import Turn, TurnTransport

_EXTENSION = "headrace.exchange"
_NO_HTTP = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
    b"connection: close\r\n\r\n%b"
)
REST_WITHIN_S = 5.0  # of a request that has its answer: cut earlier, clients lose that answer
HEAD_WITHIN_S = 10.0  # of a connection or of a request's first byte; uvicorn would wait for ever


class Exchange(Protocol):
    """Good while the application answers the request."""

    @property
    def clear(self) -> bool:
        """Whether the client takes what is written: neither behind with reading, nor gone."""
        ...

    @property
    def lost(self) -> bool:
        """The client has gone; what is written goes nowhere."""
        ...

    def has_been_quiet(self) -> bool:
        """Whether nothing has been written since the last call."""
        ...

    def listen(self, on_change: Callable[[], None] | None) -> None:
        """Call ``on_change``, from now on, when ``clear`` becomes true or the client is lost."""
        ...

    def write(self, data: bytes) -> None:
        """Send ``data``, not empty, as the next part of a body that ``send`` has started. While
        the exchange is not clear it stays in this process's memory.
        """
        ...

    def lend(self, recall: Callable[[], None]) -> int | None:
        """A file descriptor of the client's socket, for writing chunks of the body to: for one
        borrower at a time, and None unless the exchange is clear, the body has begun in chunks and
        all of it has been sent. Before anything else happens to the exchange ``recall`` is called,
        which must call ``end_loan``.
        """
        ...

    def end_loan(self, unsent: bytes, *, wrote: bool) -> None:
        """Close the descriptor that was lent, and write on with ``unsent``, framing included.
        ``wrote`` says whether anything has been written to it.
        """
        ...

    def abort(self) -> None:
        """Cut the connection, whatever is still unsent."""
        ...


def exchange_of(scope: Scope, send: Send) -> Exchange:
    """That of a request which ``ExchangeProtocol`` has read; under another server, such as a
    client that calls the application in its own process, one that never notices a hang-up.
    """
    found: Exchange | None = scope.get("extensions", {}).get(_EXTENSION)
    return found or _PlainExchange(send)


def finish_at_once(sending: Awaitable[None]) -> None:
    """Run ASGI's ``send`` without a task. It waits for nothing but a client that is behind with
    reading, so this is for exchanges that are clear.
    """
    for _ in sending.__await__():
        raise RuntimeError("a layer around the application waits in send")


class _PlainExchange:
    clear = True
    lost = False

    def __init__(self, send: Send) -> None:
        self._send = send
        self._quiet = True

    def has_been_quiet(self) -> bool:
        quiet, self._quiet = self._quiet, True
        return quiet

    def listen(self, on_change: Callable[[], None] | None) -> None:
        pass

    def write(self, data: bytes) -> None:
        self._quiet = False
        finish_at_once(self._send({"type": "http.response.body", "body": data, "more_body": True}))

    def lend(self, _recall: Callable[[], None]) -> int | None:
        return None

    def end_loan(self, unsent: bytes, *, wrote: bool) -> None:
        raise RuntimeError("nothing was lent")

    def abort(self) -> None:
        pass


class _UvicornExchange:
    __slots__ = (
        *("_connection", "_cycle", "_lent", "_on_change", "_quiet", "_recall", "_write"),
        *("clear", "lost"),
    )

    def __init__(self, cycle: RequestResponseCycle, connection: TurnTransport) -> None:
        self._cycle: RequestResponseCycle | None = cycle  # until it is over
        self._connection = connection
        self._on_change: Callable[[], None] | None = None
        self._write: Callable[[bytes], None] | None = None  # once a body has begun
        self.clear = not cycle.flow.write_paused
        self.lost = False
        self._quiet = True
        self._lent = -1
        self._recall: Callable[[], None] | None = None  # while the descriptor is lent

    @property
    def over(self) -> bool:
        return self._cycle is None or self._cycle.response_complete

    def let_go(self) -> None:
        """Of uvicorn's cycle, which has the exchange in its scope. Were both to hold the other, all
        that the request was would be left to the collector, which stops every stream to find it.
        """
        self._cycle = None

    def listen(self, on_change: Callable[[], None] | None) -> None:
        self._on_change = on_change
        if self._cycle is not None:
            self._cycle.flow.resume_reading()  # a hang-up is read; a large body may have paused it

    def has_been_quiet(self) -> bool:
        self._call_in_loan()
        quiet, self._quiet = self._quiet, True
        return quiet

    def change(self, *, clear: bool, lost: bool) -> None:
        self._call_in_loan()
        self.clear, self.lost = clear, lost
        if lost:
            self._write = _discard
            self.let_go()
        if self._on_change is not None:
            self._on_change()

    def write(self, data: bytes) -> None:
        if self._recall is not None:
            self._recall()
        self._quiet = False
        write = self._write or self._begin()
        write(b"%x\r\n%b\r\n" % (len(data), data))

    def _begin(self) -> Callable[[bytes], None]:
        cycle = self._cycle
        # HEAD has no body.
        has_body = cycle is not None and cycle.chunked_encoding
        self._write = self._connection.write if has_body else _discard
        return self._write

    def lend(self, recall: Callable[[], None]) -> int | None:
        if self._recall is not None or not self.clear or self._write in (None, _discard):
            return None
        descriptor = self._connection.idle_descriptor()
        if descriptor is None:
            return None
        try:
            self._lent = os.dup(descriptor)
        except OSError:  # this process has as many as it may: the borrower can do without
            return None
        self._recall = recall
        return self._lent

    def end_loan(self, unsent: bytes, *, wrote: bool) -> None:
        self._recall = None
        os.close(self._lent)
        if wrote:
            self._quiet = False
        if unsent:
            self._connection.write(unsent)

    def _call_in_loan(self) -> None:
        if self._recall is not None:
            self._recall()

    def abort(self) -> None:
        self._call_in_loan()
        self._connection.abort()


def _discard(_data: bytes) -> None:
    pass


def exchange_protocol() -> "type[ExchangeProtocol]":
    """For ``uvicorn.Config(http=...)`` of one server, whose connections send together."""
    return type("ExchangeProtocol", (ExchangeProtocol,), {"turn": Turn()})


class ExchangeProtocol(HttpToolsProtocol):
    turn: Turn

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._exchanges: list[_UvicornExchange] = []  # several when requests are pipelined
        self._head_is_open = False  # some of a request's head has come, and not all
        self._head_due: TimerHandle | None = None
        self._body_is_open = False
        self._rest_due: TimerHandle | None = None

    def connection_made(self, transport: BaseTransport) -> None:
        self._connection = TurnTransport(transport, self.loop, self.turn)
        super().connection_made(self._connection)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        if self._connection.lingers:
            return
        super().data_received(data)
        if self._head_is_open and self._head_due is None:
            self._expect_head()

    def _expect_head(self) -> None:
        self._head_due = self.loop.call_later(HEAD_WITHIN_S, self._cut_off)

    def _cut_off(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:  # the answer to an earlier request must not end with a later one
            self._expect_head()

    def _expect_no_head(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_is_open = True

    def on_headers_complete(self) -> None:
        self._head_is_open = False
        self._expect_no_head()
        self._body_is_open = True
        self._connection.linger_s = REST_WITHIN_S
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:  # else it is an upgrade, which is no request
            exchange = _UvicornExchange(self.cycle, self._connection)
            self._exchanges.append(exchange)
            extensions: dict[str, Any] = self.scope.setdefault("extensions", {})
            extensions[_EXTENSION] = exchange

    def on_message_complete(self) -> None:
        self._body_is_open = False
        self._connection.linger_s = 0.0
        self._expect_no_rest()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        over = [exchange for exchange in self._exchanges if exchange.over]
        self._exchanges = [exchange for exchange in self._exchanges if exchange not in over]
        for exchange in over:
            exchange.let_go()
        if self._body_is_open and self.cycle.response_complete and not self.transport.is_closing():
            self._rest_due = self.loop.call_later(REST_WITHIN_S, self._cut_rest)

    def _cut_rest(self) -> None:
        self._connection.linger_s = 0.0
        self.transport.close()

    def _expect_no_rest(self) -> None:
        if self._rest_due is not None:
            self._rest_due.cancel()
            self._rest_due = None

    def send_400_response(self, msg: str) -> None:
        """For bytes that are no HTTP. It looks as every error does, and cuts into no answer."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            body = describe(HttpError(HTTPStatus.BAD_REQUEST, msg)).body()
            self.transport.write(_NO_HTTP % (len(body), body))
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        for exchange in self._exchanges:
            exchange.clear = False

    def resume_writing(self) -> None:
        super().resume_writing()
        for exchange in self._exchanges:
            exchange.change(clear=True, lost=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_no_head()
        self._expect_no_rest()
        super().connection_lost(exc)
        for exchange in self._exchanges:
            exchange.change(clear=False, lost=True)
