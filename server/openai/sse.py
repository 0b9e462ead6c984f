"""Server-sent events that notice a hang-up, a client that does not read, and a silent wait.

``starlette.responses.StreamingResponse`` never closes its iterator, and learns of a disconnect only
at the next send, which during a long prefill is seconds away. Here the exchange calls back when the
client goes, and the producer is cancelled: its ``finally`` blocks have run before this returns.

Invariant: ``[DONE]`` is the last event of an answer that is complete, and of no other. An answer
that breaks off ends with an error event, and then the connection is cut.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from time import monotonic

import anyio
from starlette.types import Send

from protocol.errors import ServingError
from runtime.log import get_log
from server.exchange import Exchange, finish_at_once
from server.openai.errors import ErrorAnswer, describe

log = get_log(__name__)

DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"
_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamTimes:
    """Seconds. Proxies give up on a silent server after about a minute."""

    early_headers_s: float = 15.0  # until then a failure can still be a plain HTTP error
    keep_alive_s: float = 10.0
    write_stall_s: float = 30.0  # a client that reads nothing for so long is dropped

    def start(self, tick: Callable[[], None]) -> "Ticks":
        """Call ``tick`` often enough to keep to these times."""
        return Ticks(tick, min(self.early_headers_s, self.keep_alive_s, self.write_stall_s) / 4)


class Ticks:
    """Regular calls without a task, which every stream would have to pay for."""

    def __init__(self, tick: Callable[[], None], every_s: float) -> None:
        self._tick = tick
        self._every_s = every_s
        self._loop = asyncio.get_running_loop()
        self._next = self._loop.call_later(every_s, self._call)

    def _call(self) -> None:
        self._next = self._loop.call_later(self._every_s, self._call)
        self._tick()

    def cancel(self) -> None:
        self._next.cancel()


class Outcome(Enum):
    COMPLETE = "complete"
    FAILED = "failed"  # after the headers: the client has seen an error event
    HUNG_UP = "hung up"
    STALLED = "stalled"


class EventStream:
    """One response. Writing never waits: what the client is not ready for is kept until it is.
    Writers that look at ``keeps_up`` before they write keep that small.
    """

    def __init__(
        self,
        exchange: Exchange,
        send: Send,
        *,
        headers: list[tuple[bytes, bytes]],
        times: StreamTimes,
        ending: bytes = DONE,
        error_body: Callable[[ErrorAnswer], bytes] = ErrorAnswer.body,
    ) -> None:
        """``ending`` is what comes after the last event of a complete answer."""
        self._ending = ending
        self._error_body = error_body
        self._exchange = exchange
        self._send = send
        self._headers = [*_HEADERS, *headers]
        self._times = times
        self._scope = anyio.CancelScope()
        self._begun = False  # something has been written
        self._started = False  # the headers have been sent
        self._kept: list[bytes] = []
        self._gathered: Callable[[], bytes] | None = None
        self._caught_up: anyio.Event | None = None  # while somebody waits for it
        self._quiet_since = monotonic()
        self._ended_by: Outcome | None = None

    def add_headers(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """To be sent with the first event, which must not have been written yet."""
        if not self._started:
            self._headers += headers

    @property
    def exchange(self) -> Exchange:
        """For who writes to it directly, in the middle of an answer and while it is clear."""
        return self._exchange

    @property
    def keeps_up(self) -> bool:
        """Whether the client takes events as they come; else see ``gather``."""
        return self._exchange.clear

    def gather(self, gathered: Callable[[], bytes]) -> None:
        """Ask ``gathered``, when the client is ready for more, for what there is then."""
        self._gathered = gathered

    def write(self, events: bytes) -> None:
        """Send whole events. The first call sends the headers: from then on it is a 200."""
        if self._started and not self._kept and self._exchange.clear:
            self._exchange.write(events)
        else:
            self.write_last(events)
            self._send_kept()

    def write_last(self, events: bytes) -> None:
        """Keep the answer's last events, to be sent in one piece with ``[DONE]``."""
        self._begun = True
        self._kept.append(events)

    async def run(self, produce: Callable[["EventStream"], Awaitable[None]]) -> Outcome:
        """Let ``produce`` write the answer, all but ``[DONE]``, and end the response accordingly.

        Raises:
            Exception: what ``produce`` raised before anything was sent; the caller answers it.
        """
        self._exchange.listen(self._changed)
        self._changed()
        clock = self._times.start(self._mind_the_clock)
        try:
            with self._scope:
                try:
                    await produce(self)
                    await self._complete()
                except Exception as error:
                    if not self._begun:
                        raise
                    if not isinstance(error, ServingError):
                        log.exception("stream failed")
                    await self._break_off(error)
        finally:
            clock.cancel()
            self._exchange.listen(None)
            self._gathered = None  # nobody is there for it; it holds what holds this stream
        assert self._ended_by is not None
        return self._ended_by

    def _send_kept(self) -> None:
        """All that is there, as long as the client is ready for it."""
        exchange = self._exchange
        while exchange.clear and (self._kept or self._gathered):
            self._keep_gathered()
            if not self._started:
                self._start()
            if events := self._take_kept():
                exchange.write(events)

    def _keep_gathered(self) -> None:
        if self._gathered is not None:
            gathered, self._gathered = self._gathered, None
            self._kept.append(gathered())

    def _take_kept(self) -> bytes:
        events = b"".join(self._kept)
        self._kept.clear()
        return events

    def _start(self) -> None:
        self._started = True
        head = {"status": HTTPStatus.OK, "headers": self._headers}
        finish_at_once(self._send({"type": "http.response.start", **head}))

    async def _complete(self) -> None:
        await self._until_caught_up()
        if not self._started:
            self._start()
        self._ended_by = Outcome.COMPLETE  # whatever the client does from here on
        events = self._take_kept() + self._ending
        await self._send({"type": "http.response.body", "body": events, "more_body": False})

    async def _break_off(self, failure: Exception) -> None:
        """Say what happened. The body stays unfinished, so the server cuts the connection."""
        self._keep_gathered()
        self.write(b"event: error\ndata: " + self._error_body(describe(failure)) + b"\n\n")
        await self._until_caught_up()
        self._ended_by = Outcome.FAILED

    async def _until_caught_up(self) -> None:
        while not self._exchange.clear:
            self._caught_up = anyio.Event()
            await self._caught_up.wait()

    def _changed(self) -> None:
        """The client has read what it was behind with, or it has gone."""
        if self._exchange.lost:
            self._end(Outcome.HUNG_UP)
            return
        self._send_kept()
        if self._caught_up is not None and self._exchange.clear:
            self._caught_up.set()

    def _mind_the_clock(self) -> None:
        """Looks whether there were writes since the last time: a time for each would cost more."""
        times = self._times
        exchange = self._exchange
        now = monotonic()
        if not exchange.has_been_quiet():
            self._quiet_since = now
        quiet_s = now - self._quiet_since
        if not exchange.clear:
            if quiet_s > times.write_stall_s:
                self._end(Outcome.STALLED)
                exchange.abort()
        elif quiet_s >= (times.keep_alive_s if self._begun else times.early_headers_s):
            self.write(_KEEP_ALIVE)

    def _end(self, outcome: Outcome) -> None:
        if self._ended_by is None:
            self._ended_by = outcome
            self._scope.cancel()


async def unless_hung_up(exchange: Exchange, work: Callable[[], Awaitable[None]]) -> bool:
    """Run ``work`` to its end, or cancel it when the client goes; False when it has gone.

    Raises:
        Exception: what ``work`` raised.
    """
    with anyio.CancelScope() as scope:

        def changed() -> None:
            if exchange.lost:
                scope.cancel()

        exchange.listen(changed)
        changed()
        try:
            await work()
        finally:
            exchange.listen(None)
        return True
    return False
