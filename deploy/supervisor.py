"""Keeps the processes of one machine running until told to stop, and leaves none behind.

A unit is what must live and die together: one worker, or all ranks of a decode group, which step
in lock-step and cannot go on without one another. When a process ends, its unit is started again
after a pause; a unit that keeps ending, or a failure before the system was ever ready, ends all.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

import anyio

from deploy.processes import Child, Command, Lifeline, Report, describe_exit
from deploy.settings import LauncherSettings
from protocol.errors import ServingError

PEER_GRACE_S = 1.0  # for the other ranks of a group that has lost one
LAST_WORDS_S = 1.0  # for reading what an ended process had still reported
DRAIN_MARGIN_S = 2.0  # a process notices its own drain deadline before we kill it


class SystemFailed(ServingError):
    """The system cannot start or go on; everything that ran has been stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """``commands`` is asked anew for each life, 0 at first: a group needs a new meeting place."""

    name: str
    commands: Callable[[int], Sequence[Command]]


class Observer(Protocol):
    """Who shows people what happens. ``Console`` does, and the tests' recorder."""

    def reported(self, process: str, report: Report) -> None: ...

    def restarting(self, unit: str, reason: str, pause_s: float) -> None: ...


class RestartBudget:
    """How often a unit may be started again. Pure: the caller says what time it is."""

    def __init__(self, max_restarts: int, window_s: float) -> None:
        self._max_restarts = max_restarts
        self._window_s = window_s
        self._at: deque[float] = deque()

    def pause_s(self, now: float) -> float | None:
        """Seconds to wait before one more restart, twice as long each time; None: no more."""
        while self._at and now - self._at[0] >= self._window_s:
            self._at.popleft()
        if len(self._at) >= self._max_restarts:
            return None
        self._at.append(now)
        return float(min(0.1 * 2 ** len(self._at), 5.0))


class Supervisor:
    """``stages`` start together and stop one after the other: first whoever takes new requests."""

    def __init__(
        self,
        stages: Sequence[Sequence[Unit]],
        *,
        settings: LauncherSettings,
        drain_s: float,
        observer: Observer,
    ) -> None:
        self._stages = stages
        self._settings = settings
        self._drain_s = drain_s
        self._observer = observer
        self._children: dict[str, list[Child]] = {}
        self._failures: dict[str, str] = {}  # unit -> why it cannot start, as first reported
        self._ever_ready = False
        self._stopping = False

    def system_is_ready(self) -> None:
        """From now on a process that ends is started again instead of ending the system."""
        self._ever_ready = True

    def kill(self) -> None:
        """End every process at once; ``run`` then returns."""
        self._stopping = True
        for children in self._children.values():
            for child in children:
                child.kill()

    async def run(self, stop: anyio.Event) -> None:
        """Start everything; after ``stop``, drain and end everything. Nothing runs afterwards.

        Raises:
            SystemFailed: a process could not start, or ended too often.
        """
        lifeline = Lifeline()
        try:
            async with anyio.create_task_group() as tasks:
                for stage in self._stages:
                    for unit in stage:
                        tasks.start_soon(self._keep, unit, lifeline)
                await stop.wait()
                await self._drain()
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            failed, others = group.split(SystemFailed)
            if others is not None or failed is None:
                raise
            raise _first(failed) from None
        finally:
            self.kill()
            with anyio.CancelScope(shield=True):
                for children in self._children.values():
                    for child in children:
                        await child.stop(grace_s=0)
            lifeline.close()

    async def _keep(self, unit: Unit, lifeline: Lifeline) -> None:
        budget = RestartBudget(self._settings.max_restarts, self._settings.restart_window_s)
        life = 0
        while True:
            reason, failed = await self._live(unit, life, lifeline)
            if self._stopping:
                return
            if failed and not self._ever_ready:
                raise SystemFailed(self._failures.get(unit.name, f"{reason} while starting"))
            pause_s = budget.pause_s(anyio.current_time())
            if pause_s is None:
                raise SystemFailed(
                    f"{reason}, more than {self._settings.max_restarts} restarts of {unit.name} "
                    f"within {self._settings.restart_window_s:g} s: stopping everything"
                )
            self._observer.restarting(unit.name, reason, pause_s)
            await anyio.sleep(pause_s)
            life += 1

    async def _live(self, unit: Unit, life: int, lifeline: Lifeline) -> tuple[str, bool]:
        """One life of a unit: who ended first and how, and whether by itself, not by a signal."""
        ends: list[tuple[str, bool]] = []
        children = self._children[unit.name] = []
        self._failures.pop(unit.name, None)
        async with anyio.create_task_group() as tasks:

            async def attend(child: Child) -> None:
                async with anyio.create_task_group() as listening:
                    listening.start_soon(self._listen, unit, child)
                    code = await child.wait()
                    listening.cancel_scope.deadline = anyio.current_time() + LAST_WORDS_S
                ends.append((f"{child.name} ended ({describe_exit(code)})", code > 0))
                if len(ends) == 1 and not self._stopping:
                    for peer in children:
                        tasks.start_soon(peer.stop, PEER_GRACE_S)

            for command in unit.commands(life):
                children.append(await Child.start(command, lifeline))
            for child in children:
                tasks.start_soon(attend, child)
            if self._stopping:
                self.kill()
        return ends[0]

    async def _listen(self, unit: Unit, child: Child) -> None:
        async with aclosing(child.reports()) as reports:
            async for report in reports:
                if report.event == "failed":
                    said = f"{child.name}: {report.fields.get('message', 'failed')}"
                    self._failures.setdefault(unit.name, said)
                self._observer.reported(child.name, report)

    async def _drain(self) -> None:
        self._stopping = True
        for stage in self._stages:
            async with anyio.create_task_group() as tasks:
                for unit in stage:
                    for child in self._children.get(unit.name, []):
                        tasks.start_soon(child.stop, self._drain_s + DRAIN_MARGIN_S)


def _first(group: BaseExceptionGroup[SystemFailed]) -> SystemFailed:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, SystemFailed)
    return error
