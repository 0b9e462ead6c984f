"""``headrace drain``: one worker takes nothing new, finishes what runs, and ends.

The scheduler is asked, over the bus and with the cluster's key, and passes it on: whoever may use
the API may not do this. Who started the worker decides whether another takes its place.
"""

import sys
from collections.abc import Sequence

import anyio

from deploy.config import Configuration
from deploy.exits import DONE, FAILED
from protocol.codec import Decoder
from protocol.errors import ConfigError, WorkerLost
from protocol.ids import GatewayId, WorkerRef
from protocol.messages import (
    GATEWAY_ALIVE_S,
    AskDrain,
    ClusterSnapshot,
    Draining,
    FromScheduler,
    WatchCluster,
)
from runtime.bus import Connection
from runtime.keys import load_key
from server.settings import SchedulerSettings

FAMILY: Decoder[FromScheduler] = Decoder(FromScheduler)
ANSWER_S = 5.0
MARGIN_S = 15.0  # a worker that is killed at its drain's end loses its lease only later
WATCHER = GatewayId("headrace-drain")


def drain(configuration: Configuration, worker: str) -> int:
    """Ask, wait until the worker has left, and say so; failed if it has not.

    Raises:
        ConfigError: no scheduler answers, or it knows no such worker; names those that it knows.
    """
    return anyio.run(_drain, configuration.settings("scheduler", SchedulerSettings), worker)


async def _drain(settings: SchedulerSettings, worker: str) -> int:
    address = settings.bus.scheduler
    asking = _Asking(worker)
    start = anyio.current_time()
    limit_s = settings.process.drain_s + settings.lease_s + MARGIN_S
    try:
        async with (
            Connection.open(
                address, FAMILY, key=load_key(settings.bus.cluster_key_file)
            ) as connection,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(asking.watch, connection)
            tasks.start_soon(connection.read, asking.hear)
            with anyio.move_on_after(ANSWER_S):
                await asking.answered.wait()
            if asking.told:
                names = ", ".join(sorted(ref.worker_id for ref in asking.told))
                print(f"draining {names}", file=sys.stderr)
                with anyio.move_on_after(limit_s):
                    await asking.gone.wait()
            tasks.cancel_scope.cancel()
    except* WorkerLost:
        pass
    if not asking.answered.is_set():
        raise ConfigError(
            f"no scheduler answers at {address}: name it with --scheduler (headrace up prints it), "
            "and the cluster's key with --cluster-key-file"
        )
    if not asking.told:
        known = ", ".join(sorted({*asking.groups, *asking.members})) or "no worker"
        raise ConfigError(f"no worker {worker}: the scheduler at {address} knows {known}")
    if not asking.gone.is_set():
        print(f"headrace: {worker} has not left after {limit_s:g} s", file=sys.stderr)
        return FAILED
    print(f"{worker} has left after {anyio.current_time() - start:.1f} s", file=sys.stderr)
    return DONE


class _Asking:
    """What the scheduler has said so far."""

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self.told: Sequence[WorkerRef] = ()
        self.members: set[str] = set()
        self.groups: set[str] = set()
        self.answered = anyio.Event()
        self.gone = anyio.Event()

    async def watch(self, connection: Connection[FromScheduler]) -> None:
        await connection.send(WatchCluster(gateway_id=WATCHER))
        await connection.send(AskDrain(name=self._worker))
        while True:
            await anyio.sleep(GATEWAY_ALIVE_S)
            await connection.send(WatchCluster(gateway_id=WATCHER))

    def hear(self, message: FromScheduler) -> None:
        match message:
            case Draining(workers=workers):
                self.told = workers
                self.answered.set()
            case ClusterSnapshot(workers=states):
                self.members = {str(state.info.ref.worker_id) for state in states}
                self.groups = {state.info.group_id for state in states}
                if self.told and not {state.info.ref for state in states}.intersection(self.told):
                    self.gone.set()
            case _:
                pass
