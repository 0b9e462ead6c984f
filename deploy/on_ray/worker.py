"""One worker on Ray: its places, its actors, and what happens when they are lost.

A process that ends is started again where it was. An actor that ends is started again by Ray, on
another node if its own is gone; the rank then joins the others, which live on. Only when rank 0
comes to another address all ranks start anew, because they meet at its address.
"""

from collections.abc import Callable, Sequence
from typing import Any

import anyio
import ray
from ray.exceptions import RayActorError
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deploy.console import Console
from deploy.on_ray.cluster import alive_nodes
from deploy.on_ray.host import Ended, Place, RoleHost
from deploy.on_ray.placement import Gang, offers
from deploy.processes import Report, describe_exit
from deploy.settings import LauncherSettings
from deploy.supervisor import RestartBudget, SystemFailed

PLACE_POLL_S = 0.5
WORTH_A_LINE_S = 2.0  # Ray places within milliseconds what it has room for
RETRY_S = 0.5
HOST_THREADS = 3


class RayWorker:
    """A prefill worker, or all ranks of a decode worker."""

    def __init__(
        self,
        gang: Gang,
        arguments: Callable[[Sequence[Place]], Sequence[Sequence[str]]],
        *,
        names: Sequence[str],
        settings: LauncherSettings,
        console: Console,
    ) -> None:
        """``arguments`` are those of ``headrace`` for each rank, given all ranks' places."""
        self.gang = gang
        self._arguments = arguments
        self._names = names
        self._settings = settings
        self._console = console
        self._places: dict[int, Place] = {}  # by rank
        self._hosts: list[Any] = []  # actor handles, which Ray types only for decorated classes
        self._group: PlacementGroup | None = None
        self._life = 1
        self._patient = False
        self._stop = anyio.Event()
        self.ended = anyio.Event()

    def system_is_ready(self) -> None:
        """From now on a process that fails before it is ready is tried again."""
        self._patient = True

    async def run(self) -> None:
        """Serve until ``stop``. Nothing runs and no place is held afterwards.

        Raises:
            SystemFailed: a process could not start, or ended too often.
        """
        try:
            await self._take_places()
            while not self._stop.is_set():  # once, and again when rank 0 has moved
                for rank in range(self.gang.ranks):
                    await self._find(rank)
                async with anyio.create_task_group() as tasks:
                    for rank in range(self.gang.ranks):
                        tasks.start_soon(self._keep, rank, self._life)
        finally:
            self._give_back()
            self.ended.set()

    def stop(self) -> None:
        """Drain and end the processes; ``run`` then returns."""
        self._stop.set()
        for host in self._hosts:
            host.stop.remote(self._life, at_once=False)

    def kill(self) -> None:
        """End the processes at once; ``run`` then returns."""
        self._stop.set()
        self._give_back()

    async def _take_places(self) -> None:
        self._group = placement_group(
            self.gang.bundles, topology_strategy=dict(self.gang.topology), name=self.gang.name
        )
        start = anyio.current_time()
        told = False
        while placement_group_table(self._group)["state"] != "CREATED":  # an answer of Ray's head
            if not told and anyio.current_time() - start > WORTH_A_LINE_S:
                told = True
                self._console.phase(
                    self.gang.name,
                    f"waits for Ray to have room for {self.gang.wanted}; "
                    f"its nodes have: {offers(alive_nodes())}",
                )
            await anyio.sleep(PLACE_POLL_S if told else PLACE_POLL_S / 10)
            if self._stop.is_set():
                return
        self._hosts = [self._host(rank) for rank in range(self.gang.ranks)]

    def _host(self, rank: int) -> Any:
        return (
            ray.remote(RoleHost)
            .options(
                name=self._names[rank],
                num_cpus=self.gang.each["CPU"],
                num_gpus=self.gang.each.get("GPU", 0.0),
                max_restarts=-1,
                max_concurrency=HOST_THREADS,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self._group, placement_group_bundle_index=rank
                ),
            )
            .remote()
        )

    async def _find(self, rank: int) -> None:
        """Learn where the rank's actor is, once Ray has started it, unless told to stop."""
        host = self._hosts[rank]
        while not self._stop.is_set():
            try:
                self._places[rank] = await host.place.remote()
            except RayActorError:
                await anyio.sleep(RETRY_S)
            else:
                return

    async def _keep(self, rank: int, life: int) -> None:
        name = self._names[rank]
        budget = RestartBudget(self._settings.max_restarts, self._settings.restart_window_s)
        while not self._stop.is_set() and life == self._life:
            try:
                code, failure = await self._one_life(rank, life)
            except RayActorError:
                if self._stop.is_set():
                    return
                self._console.restarting(name, f"{name} lost its actor", 0.0)
                await self._find_again(rank)
                continue
            if self._stop.is_set() or life != self._life:
                return
            reason = failure or f"{name} ended ({describe_exit(code)})"
            pause_s = budget.pause_s(anyio.current_time())
            if code > 0 and not self._patient:
                raise SystemFailed(reason)
            if pause_s is None:
                raise SystemFailed(
                    f"{reason}, more than {self._settings.max_restarts} restarts of {name} within "
                    f"{self._settings.restart_window_s:g} s: stopping everything"
                )
            self._console.restarting(name, reason, pause_s)
            await anyio.sleep(pause_s)

    async def _one_life(self, rank: int, life: int) -> tuple[int, str | None]:
        """Of the rank's process: its exit code, and why it failed if it said so."""
        name, failure = self._names[rank], None
        arguments = list(self._arguments([self._places[n] for n in range(self.gang.ranks)])[rank])
        stream = self._hosts[rank].serve.options(num_returns="streaming").remote(life, arguments)
        async for reference in stream:
            match await reference:
                case Report() as report:
                    if report.event == "failed":
                        failure = f"{name}: {report.fields.get('message', 'failed')}"
                    self._console.reported(name, report)
                case Ended(code=code):
                    return code, failure
        raise RayActorError

    async def _find_again(self, rank: int) -> None:
        before = self._places[rank]
        await self._find(rank)
        place = self._places[rank]
        if place.host == before.host:
            self._places[rank] = before
            return
        if rank == 0 and self.gang.ranks > 1:
            self._console.phase(self.gang.name, f"rank 0 is now at {place.host}: all start anew")
            ended, self._life = self._life, self._life + 1
            for host in self._hosts:
                host.stop.remote(ended, at_once=True)

    def _give_back(self) -> None:
        for host in self._hosts:
            ray.kill(host)
        self._hosts = []
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
