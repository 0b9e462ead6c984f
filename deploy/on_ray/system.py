"""A gateway here and workers on Ray, as one system that starts, changes its size and stops.

Workers stop after the gateway, so requests that run can end. Which number of prefill workers is
wanted is asked of the ``Wishes`` actor; that one is not there changes nothing.
"""

from collections.abc import Callable
from typing import Any

import anyio
from anyio.abc import TaskGroup
from ray.exceptions import RayActorError

from deploy.console import Console
from deploy.on_ray.worker import RayWorker
from deploy.supervisor import DRAIN_MARGIN_S, Supervisor, SystemFailed, first_failure

WISH_POLL_S = 0.5


class RaySystem:
    """Implements ``RunningSystem``."""

    def __init__(
        self,
        gateway: Supervisor,
        *,
        decode: RayWorker,
        a_prefill_worker: Callable[[int], RayWorker],
        wishes: Any,
        prefill_workers: int,
        drain_s: float,
        console: Console,
    ) -> None:
        """``a_prefill_worker`` makes the one of that number; ``wishes`` is the actor's handle."""
        self._gateway = gateway
        self._decode = decode
        self._a_prefill_worker = a_prefill_worker
        self._wishes = wishes
        self._wanted = prefill_workers
        self._drain_s = drain_s
        self._console = console
        self._prefill: dict[int, RayWorker] = {}  # by number, those that drain too
        self._leaving: set[int] = set()
        self._ready = False
        self._stopping = False

    def system_is_ready(self) -> None:
        self._ready = True
        self._gateway.system_is_ready()
        for worker in self._workers():
            worker.system_is_ready()

    def kill(self) -> None:
        self._gateway.kill()
        for worker in self._workers():
            worker.kill()

    async def run(self, stop: anyio.Event) -> None:
        gateway_stop, gateway_ended = anyio.Event(), anyio.Event()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._run_gateway, gateway_stop, gateway_ended)
                tasks.start_soon(self._decode.run)
                tasks.start_soon(self._follow_wishes, tasks)
                await stop.wait()
                self._stopping = True
                gateway_stop.set()
                await gateway_ended.wait()
                with anyio.move_on_after(self._drain_s + 2 * DRAIN_MARGIN_S):
                    await self._stop_workers()
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            failed, others = group.split(SystemFailed)
            if others is not None or failed is None:
                raise
            raise first_failure(failed) from None
        finally:
            for worker in self._workers():
                worker.kill()

    def _workers(self) -> list[RayWorker]:
        return [self._decode, *self._prefill.values()]

    async def _run_gateway(self, stop: anyio.Event, ended: anyio.Event) -> None:
        await self._gateway.run(stop)
        ended.set()

    async def _stop_workers(self) -> None:
        workers = self._workers()
        for worker in workers:
            worker.stop()
        for worker in workers:
            await worker.ended.wait()

    async def _follow_wishes(self, workers: TaskGroup) -> None:
        while not self._stopping:
            self._adjust(workers)
            await anyio.sleep(WISH_POLL_S)
            try:
                wanted: int = await self._wishes.prefill.remote()
            except RayActorError:
                continue
            if wanted != self._wanted:
                self._console.phase("prefill", f"{wanted} workers wanted, {self._wanted} before")
                self._wanted = wanted

    def _adjust(self, workers: TaskGroup) -> None:
        while len(self._staying()) < self._wanted:
            number = next(n for n in range(len(self._prefill) + 1) if n not in self._prefill)
            worker = self._prefill[number] = self._a_prefill_worker(number)
            if self._ready:
                worker.system_is_ready()
                self._console.starting(worker.gang.name)
            workers.start_soon(self._run_prefill, number, worker)
        while len(self._staying()) > self._wanted:
            number = max(self._staying())
            self._leaving.add(number)
            self._prefill[number].stop()

    def _staying(self) -> set[int]:
        return self._prefill.keys() - self._leaving

    async def _run_prefill(self, number: int, worker: RayWorker) -> None:
        await worker.run()
        del self._prefill[number]
        self._leaving.discard(number)
