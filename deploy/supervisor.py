"""Keeps the processes of one machine running until told to stop, and leaves none behind.

A process that ends is started again after a pause; its peers live on and find it again by
themselves. One that keeps ending, or that fails before the system was ever ready, ends all.
This module does not know what the processes do.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import aclosing
from typing import Protocol

import anyio

from deploy.processes import Child, Command, Lifeline, Report, describe_exit
from deploy.settings import LauncherSettings
from protocol.errors import ServingError

LAST_WORDS_S = 1.0  # for reading what an ended process had still reported
DRAIN_MARGIN_S = 2.0  # a process notices its own drain deadline before we kill it


class SystemFailed(ServingError):
    """The system cannot start or go on; everything that ran has been stopped."""


class Observer(Protocol):
    """Who shows people what happens. ``Console`` does, and the tests' recorder."""

    def reported(self, process: str, report: Report) -> None: ...

    def restarting(self, process: str, reason: str, pause_s: float) -> None: ...


class RestartBudget:
    """How often a process may be started again. Pure: the caller says what time it is."""

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
        stages: Sequence[Sequence[Command]],
        *,
        settings: LauncherSettings,
        drain_s: float,
        observer: Observer,
    ) -> None:
        self._stages = stages
        self._settings = settings
        self._drain_s = drain_s
        self._observer = observer
        self._children: dict[str, Child] = {}  # by name; the newest life of each
        self._ever_ready = False
        self._stopping = False

    def system_is_ready(self) -> None:
        """From now on a process that ends is started again instead of ending the system."""
        self._ever_ready = True

    def kill(self) -> None:
        """End every process at once; ``run`` then returns."""
        self._stopping = True
        for child in self._children.values():
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
                    for command in stage:
                        tasks.start_soon(self._keep, command, lifeline)
                await stop.wait()
                await self._drain()
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            failed, others = group.split(SystemFailed)
            if others is not None or failed is None:
                raise
            raise first_failure(failed) from None
        finally:
            self.kill()
            with anyio.CancelScope(shield=True):
                for child in self._children.values():
                    await child.stop(grace_s=0)
            lifeline.close()

    async def _keep(self, command: Command, lifeline: Lifeline) -> None:
        budget = RestartBudget(self._settings.max_restarts, self._settings.restart_window_s)
        while True:
            code, failure = await self._live(command, lifeline)
            if self._stopping:
                return
            reason = f"{command.name} ended ({describe_exit(code)})"
            if (code > 0 or failure) and not self._ever_ready:
                raise SystemFailed(failure or f"{reason} while starting")
            pause_s = budget.pause_s(anyio.current_time())
            if pause_s is None:
                raise SystemFailed(
                    f"{failure or reason}, more than {self._settings.max_restarts} restarts of "
                    f"{command.name} within {self._settings.restart_window_s:g} s: "
                    "stopping everything"
                )
            self._observer.restarting(command.name, failure or reason, pause_s)
            await anyio.sleep(pause_s)

    async def _live(self, command: Command, lifeline: Lifeline) -> tuple[int, str | None]:
        """One life of a process: its exit code, and why it failed if it said so."""
        failures: list[str] = []
        child = self._children[command.name] = await Child.start(command, lifeline)
        if self._stopping:
            child.kill()
        async with anyio.create_task_group() as listening:
            listening.start_soon(self._listen, child, failures)
            code = await child.wait()
            listening.cancel_scope.deadline = anyio.current_time() + LAST_WORDS_S
        return code, failures[0] if failures else None

    async def _listen(self, child: Child, failures: list[str]) -> None:
        async with aclosing(child.reports()) as reports:
            async for report in reports:
                if report.event == "failed":
                    failures.append(f"{child.name}: {report.fields.get('message', 'failed')}")
                    if not self._ever_ready:
                        child.kill()  # it may want to tell others, who end with it
                self._observer.reported(child.name, report)

    async def _drain(self) -> None:
        self._stopping = True
        for stage in self._stages:
            async with anyio.create_task_group() as tasks:
                for command in stage:
                    if command.name in self._children:
                        child = self._children[command.name]
                        tasks.start_soon(child.stop, self._drain_s + DRAIN_MARGIN_S)


def first_failure(group: BaseExceptionGroup[SystemFailed]) -> SystemFailed:
    """What was raised in the innermost of nested task groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, SystemFailed)
    return error
