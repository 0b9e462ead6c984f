"""A process that makes load: ``python -m capacity.load.worker``, started by ``capacity.load.crew``.

It reads orders from stdin and writes news to stdout, and ends when stdin does. One event loop sends
everything and does little else: no display, no files, no statistics.
"""

import asyncio
import gc
import os
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from random import Random
from time import monotonic_ns

import anyio
import anyio.abc
import msgspec
import uvloop

from capacity.load.alarm import Alarm
from capacity.load.arrivals import schedule
from capacity.load.client import Client
from capacity.load.errors import LoadError
from capacity.load.messages import (
    LENGTH_BYTES,
    ClosedLoop,
    News,
    OpenLoop,
    Order,
    Progress,
    Setup,
    Stage,
    StageEnd,
    Stop,
    Trouble,
    frame,
)
from capacity.load.records import Failure, Record
from capacity.load.workload import Turn, Workload

SECOND = 1_000_000_000
_REPORT_S = 0.2
_LAG_SAMPLE_S = 0.01
_SPARE_FILES = 64
_PRIORITY = -10
_AFTER_FAILURE_S = 1.0  # a user pauses; else a server that refuses at once would be asked for ever
_GARBAGE_THRESHOLD = 100_000  # objects; records are kept, so looking through them is in vain


class Worker:
    def __init__(self, setup: Setup, send: "Sender") -> None:
        self._setup = setup
        self._send = send
        self._client = Client(setup.address, setup.api, timeout_s=setup.timeout_s)
        self._workload = Workload(setup.workload, setup.calibration)
        count_of_trace = self._workload.count
        self._sessions_to_have = sys.maxsize if count_of_trace is None else count_of_trace
        self._alarm = Alarm()
        self._finished: list[Record] = []
        self._indices = count(setup.worker, setup.workers)
        self._most = _allowed_connections()
        self._capped = False
        self._lags: list[int] = []
        self._stop = anyio.Event()
        self._sessions = 0
        self._load_end_ns = 0

    def stop(self) -> None:
        self._stop.set()

    async def run(self, stage: Stage) -> None:
        """Make the stage's load; return when nothing is under way."""
        self._stop = anyio.Event()
        self._sessions, self._capped = 0, False
        self._load_end_ns = stage.start_ns + round(min(stage.duration_s, 1e9) * SECOND)
        self._report_now(stage)
        async with anyio.create_task_group() as around:
            around.start_soon(self._report, stage)
            around.start_soon(self._measure_lag)
            async with anyio.create_task_group() as work:
                work.start_soon(self._end_in_time, stage, work.cancel_scope)
                async with anyio.create_task_group() as load:
                    if isinstance(stage.load, ClosedLoop):
                        for user in range(
                            self._setup.worker, stage.load.users, self._setup.workers
                        ):
                            load.start_soon(self._user, stage, user)
                    else:
                        load.start_soon(self._arrive, stage, load)
                work.cancel_scope.cancel()
            around.cancel_scope.cancel()
        self._client.pool.close()
        self._report_now(stage)
        end_ns = min(self._load_end_ns, monotonic_ns()) - self._setup.zero_ns
        self._send(StageEnd(worker=self._setup.worker, sessions=self._sessions, load_end_ns=end_ns))

    async def _end_in_time(self, stage: Stage, work: anyio.CancelScope) -> None:
        with anyio.move_on_after(
            (stage.start_ns - monotonic_ns()) / SECOND + stage.duration_s + stage.grace_s
        ):
            await self._stop.wait()
            self._load_end_ns = min(self._load_end_ns, monotonic_ns())
        work.cancel()

    # -- load ------------------------------------------------------------------------------------

    async def _user(self, stage: Stage, user: int) -> None:
        assert isinstance(stage.load, ClosedLoop)
        begin_ns = stage.start_ns + round(stage.load.ramp_s * SECOND * user / stage.load.users)
        await anyio.sleep(max(0, begin_ns - monotonic_ns()) / SECOND)
        for number in self._numbers(stage):
            if monotonic_ns() >= self._load_end_ns:
                return
            self._sessions += 1
            turns = self._workload.session(number)
            if not await self._session(stage, number, turns, monotonic_ns(), None):
                await anyio.sleep(_AFTER_FAILURE_S)
        self._load_end_ns = min(self._load_end_ns, monotonic_ns())

    def _numbers(self, stage: Stage) -> Iterator[int]:
        """The next session of this worker, for whichever user asks."""
        while True:
            number = self._setup.worker + self._sessions * self._setup.workers
            if stage.sessions is not None and number >= stage.sessions:
                return
            if stage.first_session + number >= self._sessions_to_have:
                return
            yield stage.first_session + number

    async def _arrive(self, stage: Stage, load: anyio.abc.TaskGroup) -> None:
        """Begin sessions on schedule. Everything that takes time is done before they are due."""
        for number, at_s in self._due(stage):
            turns = self._workload.session(number)
            request = self._request(turns[0], [])
            due_ns = stage.start_ns + round(at_s * SECOND)
            await self._alarm.until(due_ns)
            while len(self._client.under_way) >= self._most:
                self._capped = True
                await anyio.sleep(0.001)
            self._sessions += 1
            load.start_soon(self._session, stage, number, turns, due_ns, request)

    def _due(self, stage: Stage) -> Iterator[tuple[int, float]]:
        """This worker's share of sessions and when they are due, in seconds of the stage."""
        times: Iterator[float]
        if isinstance(stage.load, OpenLoop):
            source = Random(f"{self._setup.workload.seed}/arrivals/{stage.number}")
            times = schedule(stage.load.arrivals, stage.load.rate, stage.duration_s, source)
        else:
            assert not isinstance(stage.load, ClosedLoop)
            speed = stage.load.speed
            times = ((at_s or 0.0) / speed for at_s in self._workload.starts_s)
        for number, at_s in enumerate(times):
            if at_s >= stage.duration_s or (
                stage.sessions is not None and number >= stage.sessions
            ):
                return
            if stage.first_session + number >= self._sessions_to_have:
                return
            if number % self._setup.workers == self._setup.worker:
                yield stage.first_session + number, at_s

    async def _session(
        self, stage: Stage, number: int, turns: list[Turn], due_ns: int, request: bytes | None
    ) -> bool:
        """All turns, one after the other; a turn that fails ends the session. Whether none did."""
        history: list[dict[str, str]] = []
        for place, turn in enumerate(turns):
            if place:
                due_ns = self._next_due(stage, turn)
                if due_ns >= self._load_end_ns:
                    return True
                await anyio.sleep(max(0, due_ns - monotonic_ns()) / SECOND)
                request = None
            record = Record(
                index=next(self._indices),
                stage=stage.number,
                intended_ns=due_ns,
                session=number,
                turn=place,
                worker=self._setup.worker,
                wanted_input=turn.input_tokens,
                wanted_output=turn.output_tokens,
            )
            continued = place + 1 < len(turns) and turns[place + 1].continues
            request = request or self._request(turn, history)
            try:
                text = await self._client.ask(request, record, keep_text=continued)
            finally:
                if self._stop.is_set() and record.error == Failure.ABANDONED:
                    record.error = str(Failure.INTERRUPTED)
                self._finished.append(record)
            if record.error:
                return False
            if continued and isinstance(turn.prompt, str):
                history.append({"role": "user", "content": turn.prompt})
                history.append({"role": "assistant", "content": text})
        return True

    def _next_due(self, stage: Stage, turn: Turn) -> int:
        due_ns = monotonic_ns() + round(turn.delay_s * SECOND)
        if turn.at_s is not None and not isinstance(stage.load, ClosedLoop | OpenLoop):
            return max(due_ns, stage.start_ns + round(turn.at_s / stage.load.speed * SECOND))
        return due_ns

    def _request(self, turn: Turn, history: list[dict[str, str]]) -> bytes:
        before = history if turn.continues else ()
        body = self._client.api.body(turn.prompt, turn.output_tokens, history=before)
        return self._client.request(body)

    # -- news ------------------------------------------------------------------------------------

    async def _report(self, stage: Stage) -> None:
        while True:
            await anyio.sleep(_REPORT_S)
            self._report_now(stage)

    def _report_now(self, stage: Stage) -> None:
        now = monotonic_ns()
        attempts = self._client.under_way.values()
        late = 0
        if stage.late_after_ns:
            late = sum(
                now - attempt.record.intended_ns > stage.late_after_ns
                for attempt in attempts
                if not attempt.chunks
            )
        records, self._finished = self._finished, []
        lags, self._lags = self._lags, []
        for record in records:
            _count_from(record, self._setup.zero_ns)
        self._send(
            Progress(
                worker=self._setup.worker,
                records=records,
                under_way=len(attempts),
                late=late,
                chunks=sum(attempt.chunks for attempt in attempts),
                cpu_s=time.process_time(),
                wall_s=time.monotonic(),
                lags_ns=lags,
                capped=self._capped,
            )
        )

    async def _measure_lag(self) -> None:
        while True:
            before = monotonic_ns()
            await anyio.sleep(_LAG_SAMPLE_S)
            self._lags.append(max(0, monotonic_ns() - before - round(_LAG_SAMPLE_S * SECOND)))


class Sender:
    """Writes news to a pipe; never waits, the event loop writes what the pipe does not take."""

    def __init__(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport

    def __call__(self, news: News) -> None:
        self._transport.write(frame(news))


def _count_from(record: Record, zero_ns: int) -> None:
    record.intended_ns -= zero_ns
    for name in ("started_ns", "sent_ns", "first_byte_ns", "first_token_ns", "last_token_ns"):
        if at := getattr(record, name):
            setattr(record, name, at - zero_ns)
    if record.done_ns:
        record.done_ns -= zero_ns
    record.chunks_ns = [at - zero_ns for at in record.chunks_ns]


def _allowed_connections() -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(1, hard - _SPARE_FILES)


def collect_seldom() -> None:
    """Keep the garbage collector away from what is here now, and rare: it stops the event loop."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GARBAGE_THRESHOLD)


def _ask_for_priority() -> None:
    """A client that waits for a core measures itself. Needs a privilege; without it, no harm.

    Best is to be woken at once, whoever computes; the kernel keeps a share for the others. Else a
    higher priority, which where Linux groups processes by session counts only within the group.
    """
    with suppress(OSError, AttributeError):  # systems other than Linux have no such call
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        return
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _PRIORITY)
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(_PRIORITY))


async def orders(stdin: asyncio.StreamReader) -> AsyncIterator[Order]:
    while True:
        try:
            length = await stdin.readexactly(LENGTH_BYTES)
            body = await stdin.readexactly(int.from_bytes(length, "big"))
        except asyncio.IncompleteReadError:
            return
        yield msgspec.msgpack.decode(body, type=Order)


async def main() -> None:
    loop = asyncio.get_running_loop()
    stdin = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin.buffer)
    transport, _ = await loop.connect_write_pipe(asyncio.Protocol, sys.stdout.buffer)
    send = Sender(transport)
    worker: Worker | None = None
    async with anyio.create_task_group() as tasks:
        async for order in orders(stdin):
            if isinstance(order, Setup):
                try:
                    worker = Worker(order, send)
                except LoadError as error:
                    send(Trouble(worker=order.worker, message=str(error)))
                    return
                collect_seldom()
            elif isinstance(order, Stage):
                assert worker is not None
                tasks.start_soon(worker.run, order)
            elif worker is not None:
                assert isinstance(order, Stop)
                worker.stop()
        tasks.cancel_scope.cancel()
    transport.abort()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which says Stop
    os.set_blocking(sys.stdout.fileno(), False)
    _ask_for_priority()
    uvloop.run(main())
