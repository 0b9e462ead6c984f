"""The event-loop half of a worker process, the same for every role.

The engine half runs in a thread of its own and owns everything that computes; this half moves
messages between the bus and the engine's mailboxes, keeps the registration, and drains when a
signal or the scheduler says so.
"""

import signal
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import anyio
import msgspec

from protocol.codec import Decoder
from runtime.bus import Listener
from runtime.collector import spare_the_collector
from runtime.keys import ClusterKey
from runtime.log import get_log
from runtime.mailbox import Outbox
from runtime.registration import Registration

log = get_log(__name__)

M_contra = TypeVar("M_contra", contravariant=True)
M = TypeVar("M")
ToPeer = tuple[bytes, msgspec.Struct]


class DrainableLoop(Protocol):
    """What any engine thread offers to its event loop. All but ``run`` are thread-safe."""

    def run(self) -> None:
        """Serve until drained or stopped, on the calling thread.

        An exception ends the process: whoever supervises it starts another.
        """
        ...

    def drain(self) -> None:
        """Take no new requests, finish the running ones, then let ``run`` return."""
        ...

    def stop(self) -> None:
        """Let ``run`` return at the next step boundary, whatever is running."""
        ...


class EngineLoop(DrainableLoop, Protocol[M_contra]):
    """One that serves requests from the bus."""

    def post(self, peer: bytes, message: M_contra) -> None: ...


class WorkerProcess(Generic[M]):
    """Serves one engine loop over the bus until a signal or the loop itself ends it."""

    def __init__(
        self,
        family: Decoder[M],
        *,
        make_engine: Callable[[str, Outbox[ToPeer]], tuple[EngineLoop[M], Registration]],
        on_serving: Callable[[], None],
        drain_s: float,
        key: ClusterKey | None = None,
    ) -> None:
        """``make_engine`` gets the bus address and the way out; it is called on the event loop.

        ``on_serving`` is called once, when the scheduler has accepted the worker.
        """
        self._family = family
        self._make_engine = make_engine
        self._on_serving = on_serving
        self._drain_s = drain_s
        self._key = key

    async def serve(self, address: str) -> None:
        """
        Raises:
            ConfigError: the address cannot be bound, or the scheduler refuses this worker.
        """
        async with Listener.bind(address, self._family, key=self._key) as listener:
            outbox: Outbox[ToPeer] = Outbox()
            engine, registration = self._make_engine(listener.address, outbox)
            spare_the_collector()
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(_receive, listener, engine)
                    tasks.start_soon(registration.run)
                    tasks.start_soon(self._announce_serving, registration)
                    tasks.start_soon(self._drain_when_told, engine, registration)
                    tasks.start_soon(_stop_when_cancelled, engine)
                    async with anyio.create_task_group() as delivery:
                        delivery.start_soon(_deliver, listener, outbox)
                        await anyio.to_thread.run_sync(engine.run)
                        outbox.close()  # what the engine said last is still on its way out
                    tasks.cancel_scope.cancel()
            except ExceptionGroup as failures:
                raise _first_of(failures) from None

    async def _announce_serving(self, registration: Registration) -> None:
        await registration.accepted.wait()
        self._on_serving()

    async def _drain_when_told(self, engine: EngineLoop[M], registration: Registration) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with anyio.create_task_group() as told:

                async def by_the_scheduler() -> None:
                    await registration.drain_asked.wait()
                    told.cancel_scope.cancel()

                told.start_soon(by_the_scheduler)
                await anext(signals)
                told.cancel_scope.cancel()
            log.info("draining", limit_s=self._drain_s)
            engine.drain()
            with anyio.move_on_after(self._drain_s):
                await anext(signals)
            engine.stop()


async def serve_until_told(engine: DrainableLoop, drain_s: float) -> None:
    """Run an engine loop that nobody reaches over the bus, with the signals of any worker."""

    async def drain_when_told() -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            await anext(signals)
            engine.drain()
            with anyio.move_on_after(drain_s):
                await anext(signals)
            engine.stop()

    spare_the_collector()
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(drain_when_told)
            tasks.start_soon(_stop_when_cancelled, engine)
            await anyio.to_thread.run_sync(engine.run)
            tasks.cancel_scope.cancel()
    except ExceptionGroup as failures:
        raise _first_of(failures) from None


async def _stop_when_cancelled(engine: DrainableLoop) -> None:
    # A thread cannot be cancelled: without this the task group would wait for it for ever.
    try:
        await anyio.sleep_forever()
    finally:
        engine.stop()


async def _receive(listener: Listener[M], engine: EngineLoop[M]) -> None:
    async for peer, message in listener:
        engine.post(peer, message)


async def _deliver(listener: Listener[M], outbox: Outbox[ToPeer]) -> None:
    async for peer, message in outbox:
        await listener.send(peer, message)


def _first_of(failures: BaseExceptionGroup[Exception]) -> Exception:
    found: BaseException = failures
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, Exception)
    return found


class Beat:
    """Says when ``interval_s`` has passed; for work that an engine loop does now and then."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._next = time.monotonic() + interval_s

    def due(self, now: float) -> bool:
        if now < self._next:
            return False
        self._next = now + self._interval_s
        return True
