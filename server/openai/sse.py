"""Server-sent events that notice a hang-up, a client that does not read, and a silent wait.

``starlette.responses.StreamingResponse`` never closes its iterator, and learns of a disconnect only
at the next send, which during a long prefill is seconds away. Here the producer runs beside a watch
of the connection and is cancelled by it, so that its ``finally`` blocks have run before the
response returns.

Invariant: ``[DONE]`` is the last event of an answer that is complete, and of no other. An answer
that breaks off ends with an error event, and then the connection is cut.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from time import monotonic

import anyio
from anyio.abc import TaskGroup
from starlette.types import Receive, Send

from protocol.errors import ServingError
from runtime.log import get_log
from server.direct_body import DirectBody
from server.openai.errors import describe

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

    @property
    def tick_s(self) -> float:
        return min(self.early_headers_s, self.keep_alive_s, self.write_stall_s) / 4


class Outcome(Enum):
    COMPLETE = "complete"
    FAILED = "failed"  # after the headers: the client has seen an error event
    HUNG_UP = "hung up"
    STALLED = "stalled"


class EventStream:
    """One response. Writing never waits: what the client is not ready for is kept, and a task that
    runs only then sends it on. Writers that look at ``keeps_up`` before they write keep that small.
    """

    def __init__(
        self,
        receive: Receive,
        send: Send,
        *,
        headers: list[tuple[bytes, bytes]],
        times: StreamTimes,
        direct: DirectBody | None = None,
    ) -> None:
        """``direct`` spares most events the way through ``send``."""
        self._receive = receive
        self._send = send
        self._headers = [*_HEADERS, *headers]
        self._times = times
        self._direct = direct
        self._tasks: TaskGroup  # while ``run`` does
        self._begun = False  # something has been written
        self._started = False  # the headers have been sent
        self._completing = False
        self._kept: list[bytes] = []
        self._sent: anyio.Event | None = None  # while kept events are being sent
        self._gathered: Callable[[], bytes] | None = None
        self._quiet_since = monotonic()
        self._ended_by: Outcome | None = None

    @property
    def keeps_up(self) -> bool:
        """Whether the client takes events as they come; else see ``gather``."""
        return self._sent is None

    def gather(self, gathered: Callable[[], bytes]) -> None:
        """Ask ``gathered``, when the client is ready for more, for what there is then."""
        self._gathered = gathered

    def write(self, events: bytes) -> None:
        """Send whole events. The first call sends the headers: from then on it is a 200."""
        clear = self._sent is None and not self._kept
        if clear and self._direct is not None and self._direct.write(events):
            self._quiet_since = monotonic()
            return
        self._begun = True
        self._kept.append(events)
        if self._sent is None:
            self._sent = anyio.Event()
            self._tasks.start_soon(self._send_kept, self._sent)

    def write_last(self, events: bytes) -> None:
        """Keep the answer's last events, to be sent in one piece with ``[DONE]``."""
        self._begun = True
        self._kept.append(events)

    async def run(self, produce: Callable[["EventStream"], Awaitable[None]]) -> Outcome:
        """Let ``produce`` write the answer, all but ``[DONE]``, and end the response accordingly.

        Raises:
            Exception: what ``produce`` raised before anything was sent; the caller answers it.
        """
        failure: Exception | None = None
        async with anyio.create_task_group() as self._tasks:
            self._tasks.start_soon(self._watch)
            try:
                await produce(self)
                await self._complete()
            except Exception as error:
                failure = error
                if self._begun:
                    if not isinstance(error, ServingError):
                        log.exception("stream failed")
                    await self._break_off(error)
            self._tasks.cancel_scope.cancel()
        if failure is not None and not self._begun:
            raise failure
        assert self._ended_by is not None
        return self._ended_by

    async def _send_kept(self, sent: anyio.Event) -> None:
        """Events that could not be written at once, then what has gathered meanwhile, and so on."""
        while True:
            if self._kept:
                await self._send_body(self._take_kept())
            elif self._gathered is not None:
                gathered, self._gathered = self._gathered, None
                self._kept.append(gathered())
            else:
                break
        self._sent = None
        sent.set()

    def _take_kept(self) -> bytes:
        events = b"".join(self._kept)
        self._kept.clear()
        return events

    async def _send_body(self, events: bytes, *, more: bool = True) -> None:
        self._quiet_since = monotonic()
        if not self._started:
            self._started = True
            head = {"status": HTTPStatus.OK, "headers": self._headers}
            await self._send({"type": "http.response.start", **head})
        await self._send({"type": "http.response.body", "body": events, "more_body": more})

    async def _complete(self) -> None:
        if self._sent is not None:
            await self._sent.wait()
        self._sent = anyio.Event()
        self._completing = True
        await self._send_body(self._take_kept() + DONE, more=False)
        self._ended_by = Outcome.COMPLETE

    async def _break_off(self, failure: Exception) -> None:
        """Say what happened. The body stays unfinished, so the server cuts the connection."""
        with anyio.move_on_after(self._times.write_stall_s):
            self.write(b"event: error\ndata: " + describe(failure).body() + b"\n\n")
            if self._sent is not None:
                await self._sent.wait()
        self._ended_by = self._ended_by or Outcome.FAILED

    async def _watch(self) -> None:
        """One task for the connection and the clock: a task costs as much as several tokens."""
        while self._ended_by is None:
            with anyio.move_on_after(self._times.tick_s):
                if (await self._receive())["type"] == "http.disconnect":
                    if not self._completing:  # servers say so after the last byte too
                        self._end(Outcome.HUNG_UP)
                    return
                continue
            self._mind_the_clock()

    def _end(self, outcome: Outcome) -> None:
        self._ended_by = outcome
        self._tasks.cancel_scope.cancel()

    def _mind_the_clock(self) -> None:
        times = self._times
        quiet_s = monotonic() - self._quiet_since
        if self._sent is not None:
            if quiet_s > times.write_stall_s:
                self._end(Outcome.STALLED)
        elif quiet_s >= (times.keep_alive_s if self._begun else times.early_headers_s):
            self.write(_KEEP_ALIVE)


async def unless_hung_up(receive: Receive, work: Callable[[], Awaitable[None]]) -> bool:
    """Run ``work`` to its end, or cancel it when the client goes; False when it has gone.

    Raises:
        Exception: what ``work`` raised.
    """
    failure: Exception | None = None
    finished = False
    async with anyio.create_task_group() as tasks:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            tasks.cancel_scope.cancel()

        tasks.start_soon(watch)
        try:
            await work()
            finished = True
        except Exception as error:  # noqa: BLE001  carried out of the task group unchanged
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return finished
