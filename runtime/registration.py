"""A worker's membership in the cluster: announce, keep the lease alive, announce again.

The scheduler may restart or be out of reach; the worker serves on, since nothing on the data
path needs the scheduler, and announces itself to whichever scheduler answers next.
"""

from collections.abc import Callable
from typing import NoReturn

import anyio

from protocol.codec import Decoder
from protocol.errors import ConfigError, WorkerLost
from protocol.messages import (
    Announce,
    Drain,
    FromScheduler,
    Heartbeat,
    Refused,
    UnknownWorker,
    Welcome,
    Withdraw,
)
from protocol.workers import ExpertReport, PrefixEvents, WorkerInfo, WorkerLoad
from runtime.bus import Connection
from runtime.keys import ClusterKey
from runtime.log import get_log

log = get_log(__name__)

RETRY_S = 0.5
FAILURES_WORTH_A_LINE = 4  # a scheduler that starts or stops beside us is out of reach for a moment
WITHDRAW_GRACE_S = 1.0
FAMILY: Decoder[FromScheduler] = Decoder(FromScheduler)


class Registration:
    """What one worker tells the scheduler. ``info`` may be replaced: the next beat announces it."""

    def __init__(
        self,
        scheduler_address: str,
        *,
        info: Callable[[], WorkerInfo | None],
        load: Callable[[], WorkerLoad],
        prefix: Callable[[bool], PrefixEvents | None] = lambda _snapshot: None,
        experts: Callable[[], ExpertReport | None] = lambda: None,
        key: ClusterKey | None = None,
    ) -> None:
        """``info`` is None while the worker cannot serve: it is then withdrawn. ``prefix`` gives
        the changes since its last call, or everything when asked for a snapshot. ``experts`` gives
        another object when there is something new.
        """
        self._address = scheduler_address
        self._info = info
        self._load = load
        self._prefix = prefix
        self._experts = experts
        self._key = key
        self._announced: WorkerInfo | None = None
        self._reported: ExpertReport | None = None
        self._heartbeat_s = 1.0
        self._changed = anyio.Event()
        self.accepted = anyio.Event()
        self.drain_asked = anyio.Event()

    def changed(self) -> None:
        """``info`` differs from before: tell the scheduler now instead of at the next beat."""
        self._changed.set()

    async def run(self) -> NoReturn:
        """Keep the membership until cancelled; then withdraw.

        Raises:
            ConfigError: the scheduler refuses this worker; the message has the differences.
        """
        failures = 0
        while True:
            try:
                async with Connection.open(self._address, FAMILY, key=self._key) as connection:
                    failures = 0
                    await self._stay(connection)
            except WorkerLost:
                failures += 1
            if failures == FAILURES_WORTH_A_LINE:
                log.warning("scheduler out of reach, serving on", address=self._address)
            await anyio.sleep(RETRY_S)

    async def _stay(self, connection: Connection[FromScheduler]) -> None:
        self._forget()
        refusal: ConfigError | None = None
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._beat, connection)
                try:
                    await connection.read(self._hear)
                except ConfigError as error:
                    refusal = error  # raised below, where no group wraps it
                tasks.cancel_scope.cancel()
        finally:
            if self._announced is not None and not connection.lost.is_set():
                with anyio.move_on_after(WITHDRAW_GRACE_S, shield=True):
                    worker = self._announced.ref
                    await connection.send(Withdraw(worker=worker, reason="leaving"))
        if refusal is not None:
            raise refusal

    def _forget(self) -> None:
        self._announced = None
        self._reported = None

    def _hear(self, message: FromScheduler) -> None:
        match message:
            case Welcome(heartbeat_s=heartbeat_s):
                self._heartbeat_s = heartbeat_s
                self.accepted.set()
            case Drain(worker=worker):
                if self._announced is not None and worker == self._announced.ref:
                    self.drain_asked.set()
            case UnknownWorker():
                self._forget()
                self.changed()
            case Refused(reason=reason, differences=differences):
                parts = "; ".join(
                    f"{d.part}: ours {d.yours!r}, {d.ours_from} has {d.ours!r}" for d in differences
                )
                raise ConfigError(f"the scheduler refuses this worker: {reason}. {parts}")
            case _:
                pass

    def _heartbeat(self, info: WorkerInfo, *, snapshot: bool) -> Heartbeat:
        report = self._experts()
        news = None if report is self._reported and not snapshot else report
        self._reported = report
        prefix = self._prefix(snapshot)
        return Heartbeat(worker=info.ref, load=self._load(), prefix=prefix, experts=news)

    async def _beat(self, connection: Connection[FromScheduler]) -> NoReturn:
        while True:
            self._changed = anyio.Event()
            info = self._info()
            if info is None:
                if self._announced is not None:
                    worker = self._announced.ref
                    await connection.send(Withdraw(worker=worker, reason="cannot serve now"))
            elif info != self._announced:
                await connection.send(Announce(info=info, load=self._load()))
                await connection.send(self._heartbeat(info, snapshot=True))
            else:
                await connection.send(self._heartbeat(info, snapshot=False))
            self._announced = info
            with anyio.move_on_after(self._heartbeat_s):
                await self._changed.wait()
