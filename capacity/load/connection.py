"""HTTP/1.1 connections that remember when bytes came.

The clock is read first thing when the socket is readable, before the bytes are looked at. Framing
is left to httptools (C); what the body means is read later, by ``capacity.load.events``. There is
no retry: a connection that has been idle long enough for a server to close it is not used again,
and every other failure is the server's.
"""

import asyncio
import errno
import ssl
from collections.abc import Callable
from time import monotonic_ns
from typing import cast

import httptools

from capacity.load.address import Address
from capacity.load.records import Failure

MAX_IDLE_NS = 2_000_000_000  # below the keep-alive time of common servers
CONNECT_S = 10.0

_FAILURES = {
    errno.ECONNREFUSED: Failure.REFUSED,
    errno.EADDRNOTAVAIL: Failure.EXHAUSTED,
    errno.EMFILE: Failure.EXHAUSTED,
    errno.ENFILE: Failure.EXHAUSTED,
}

BodyPart = Callable[[list[bytes], list[int]], None]


class Broken(Exception):
    """An exchange that did not complete."""

    def __init__(self, failure: Failure, message: str) -> None:
        super().__init__(message)
        self.failure = failure


class Answer:
    """An answer while it arrives. ``pieces`` and ``times`` (monotonic ns) go together; when there
    are ``MANY`` of them they are handed to ``digest`` and begin anew, so that reading a long stream
    never holds up the others for long.
    """

    MANY = 256
    __slots__ = (
        *("digest", "digested", "done_ns", "first_byte_ns", "headers"),
        *("pieces", "sent_ns", "status", "times"),
    )

    def __init__(self, digest: BodyPart) -> None:
        self.status = 0
        self.sent_ns = 0
        self.headers: dict[bytes, bytes] = {}  # names in lower case
        self.first_byte_ns = 0
        self.done_ns = 0
        self.pieces: list[bytes] = []
        self.times: list[int] = []
        self.digest = digest
        self.digested = 0

    def flush(self) -> None:
        pieces, times = self.pieces, self.times
        self.pieces, self.times = [], []
        self.digested += len(pieces)
        self.digest(pieces, times)


class Connection(asyncio.Protocol):
    """One exchange at a time."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.WriteTransport | None = None
        self._answer = Answer(lambda _, __: None)
        self._ended: asyncio.Future[None] | None = None
        self._now = 0
        self._reusable = False
        self.idle_since_ns = 0
        self.open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's is no subclass
        self.open = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        answer = self._answer
        if answer.status and not self._has_length(answer):
            self._now = monotonic_ns()
            self.on_message_complete()  # such an answer ends with its connection
        self._fail(Failure.CLOSED, f"the server closed the connection{f': {exc}' if exc else ''}")

    def data_received(self, data: bytes) -> None:
        self._now = monotonic_ns()
        answer = self._answer
        if not answer.first_byte_ns:
            answer.first_byte_ns = self._now
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(Failure.MALFORMED, f"not HTTP: {error}")
            self.close()

    # -- called by httptools ---------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self._answer.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        answer = self._answer
        answer.pieces.append(data)
        answer.times.append(self._now)
        if len(answer.times) == Answer.MANY:
            answer.flush()

    def on_message_complete(self) -> None:
        answer = self._answer
        answer.done_ns = self._now
        self._reusable = self._parser.should_keep_alive()  # the parser knows it only now
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    # -- called by the pool's user ---------------------------------------------------------------

    async def exchange(self, request: bytes, answer: Answer, *, timeout_s: float) -> None:
        """Send a request and fill ``answer`` until it has ended.

        Raises:
            Broken: the answer did not end well; what has come of it is in ``answer``.
        """
        assert self._transport is not None
        loop = asyncio.get_running_loop()
        self._answer = answer
        self._ended = loop.create_future()
        if not self.open:
            raise Broken(Failure.CLOSED, "the server closed the connection")
        alarm = loop.call_later(timeout_s, self._time_out, timeout_s)
        answer.sent_ns = monotonic_ns()
        self._transport.write(request)
        try:
            await self._ended
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            alarm.cancel()
            self._ended = None
        if not self._reusable:
            self.close()

    def close(self) -> None:
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    @staticmethod
    def _has_length(answer: Answer) -> bool:
        return b"content-length" in answer.headers or b"transfer-encoding" in answer.headers

    def _time_out(self, timeout_s: float) -> None:
        self._fail(Failure.TIMEOUT, f"no complete answer within {timeout_s:g} s")
        self.close()

    def _fail(self, failure: Failure, message: str) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(Broken(failure, message))


class Pool:
    """Connections to one address; the one used last is used first, and there is no limit."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._context = address.ssl_context()
        self._idle: list[Connection] = []

    async def connection(self) -> tuple[Connection, bool]:
        """An open connection, and whether it is new.

        Raises:
            Broken: none can be made.
        """
        latest = monotonic_ns() - MAX_IDLE_NS
        while self._idle:
            connection = self._idle.pop()
            if connection.open and connection.idle_since_ns > latest:
                return connection, False
            connection.close()
        return await self._connect(), True

    def give_back(self, connection: Connection) -> None:
        if connection.open:
            connection.idle_since_ns = monotonic_ns()
            self._idle.append(connection)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _connect(self) -> Connection:
        address = self._address
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, connection = await loop.create_connection(
                    Connection,
                    address.numeric_host or address.host,
                    address.port,
                    ssl=self._context,
                    server_hostname=address.host if address.tls else None,
                )
        except TimeoutError:
            message = f"no connection within {CONNECT_S:g} s"
            raise Broken(Failure.UNREACHABLE, message) from None
        except ssl.SSLError as error:
            raise Broken(Failure.UNREACHABLE, f"TLS: {error.reason or error}") from None
        except OSError as error:
            failure = _FAILURES.get(error.errno or 0, Failure.UNREACHABLE)
            raise Broken(failure, error.strerror or str(error)) from None
        return connection
