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
from starlette.types import Receive, Send

from protocol.errors import ServingError
from runtime.log import get_log
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
    """One response. ``write`` may be called from several tasks; events are never mixed."""

    def __init__(
        self,
        receive: Receive,
        send: Send,
        *,
        headers: list[tuple[bytes, bytes]],
        times: StreamTimes,
    ) -> None:
        self._receive = receive
        self._send = send
        self._headers = [*_HEADERS, *headers]
        self._times = times
        self._started = False
        self._writing = 0
        self._quiet_since = monotonic()
        self._ended_by: Outcome | None = None

    async def write(self, events: bytes) -> None:
        """Send whole events. The first call sends the headers: from then on it is a 200."""
        if not self._started:
            await self._start()
        self._quiet_since = monotonic()
        self._writing += 1
        await self._send({"type": "http.response.body", "body": events, "more_body": True})
        self._writing -= 1

    async def run(self, produce: Callable[["EventStream"], Awaitable[None]]) -> Outcome:
        """Let ``produce`` write the answer, all but ``[DONE]``, and end the response accordingly.

        Raises:
            Exception: what ``produce`` raised before anything was sent; the caller answers it.
        """
        failure: Exception | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch, tasks.cancel_scope)
            try:
                await produce(self)
                await self._complete()
            except Exception as error:
                failure = error
                if self._started and not isinstance(error, ServingError):
                    log.exception("stream failed")
            tasks.cancel_scope.cancel()
        if failure is None:
            assert self._ended_by is not None
            return self._ended_by
        if not self._started:
            raise failure
        await self._break_off(failure)
        return Outcome.FAILED

    async def _start(self) -> None:
        self._started = True
        head = {"status": HTTPStatus.OK, "headers": self._headers}
        await self._send({"type": "http.response.start", **head})

    async def _complete(self) -> None:
        await self.write(DONE)
        self._ended_by = Outcome.COMPLETE  # servers report a disconnect after the last byte too
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _break_off(self, failure: Exception) -> None:
        """Say what happened. The body stays unfinished, so the server cuts the connection."""
        with anyio.move_on_after(self._times.write_stall_s):
            await self.write(b"event: error\ndata: " + describe(failure).body() + b"\n\n")

    async def _watch(self, scope: anyio.CancelScope) -> None:
        """One task for the connection and the clock: a task costs as much as several tokens."""
        while self._ended_by is None:
            with anyio.move_on_after(self._times.tick_s):
                if (await self._receive())["type"] == "http.disconnect":
                    self._ended_by = self._ended_by or Outcome.HUNG_UP
                continue
            await self._mind_the_clock()
        scope.cancel()

    async def _mind_the_clock(self) -> None:
        times = self._times
        quiet_s = monotonic() - self._quiet_since
        if self._writing:
            if quiet_s > times.write_stall_s:
                self._ended_by = Outcome.STALLED
        elif quiet_s >= (times.keep_alive_s if self._started else times.early_headers_s):
            with anyio.move_on_after(times.write_stall_s) as patience:
                await self.write(_KEEP_ALIVE)
            if patience.cancelled_caught:
                self._ended_by = Outcome.STALLED


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
