"""The supervisor with real, tiny processes in place of the roles."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import psutil
import pytest

from deploy.processes import Command, Report
from deploy.settings import LauncherSettings
from deploy.supervisor import RestartBudget, Supervisor, SystemFailed

pytestmark = pytest.mark.anyio

DEADLINE_S = 20.0
# What every role does at its start; then it serves until it is told to stop.
ROLE = """
import os, signal, sys
from runtime.parent import die_with_parent
from runtime.reporting import report
die_with_parent()
report("ready", pid=os.getpid())
"""
SERVE = ROLE + "signal.pause()"
STUBBORN = ROLE + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: signal.pause()"
BROKEN = ROLE + "report('failed', message='no weights at /nowhere'); sys.exit(1)"
CRASH = ROLE + "sys.exit(3)"


class Recorder:
    """Remembers what happened, and lets a test wait for it."""

    def __init__(self) -> None:
        self.pids: dict[str, list[int]] = {}
        self.restarts: list[tuple[str, str]] = []
        self._changed = anyio.Event()

    def reported(self, process: str, report: Report) -> None:
        pid = report.fields.get("pid")
        if isinstance(pid, int):
            self.pids.setdefault(process, []).append(pid)
        self._tell()

    def restarting(self, process: str, reason: str, pause_s: float) -> None:
        self.restarts.append((process, reason))
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def until(self, condition: Callable[["Recorder"], bool]) -> None:
        with anyio.fail_after(DEADLINE_S):
            while not condition(self):
                await self._changed.wait()

    def all_pids(self) -> list[int]:
        return [pid for pids in self.pids.values() for pid in pids]


def a_process(name: str, script: str) -> Command:
    return Command(name=name, argv=(sys.executable, "-c", script))


def a_supervisor(recorder: Recorder, *commands: Command, drain_s: float = 5.0) -> Supervisor:
    return Supervisor(
        [[command] for command in commands],
        settings=LauncherSettings(max_restarts=2),
        drain_s=drain_s,
        observer=recorder,
    )


@asynccontextmanager
async def running(supervisor: Supervisor) -> AsyncIterator[anyio.Event]:
    """The system between start and the end of its drain."""
    stop = anyio.Event()
    with anyio.fail_after(DEADLINE_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(supervisor.run, stop)
            yield stop
            stop.set()


def alive(pids: list[int]) -> list[int]:
    return [
        pid
        for pid in pids
        if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ]


async def test_stopping_leaves_no_process() -> None:
    recorder = Recorder()
    supervisor = a_supervisor(recorder, a_process("gateway", SERVE), a_process("decode", SERVE))
    async with running(supervisor):
        await recorder.until(lambda seen: len(seen.all_pids()) == 2)
    assert alive(recorder.all_pids()) == []
    assert recorder.restarts == []


async def test_a_process_that_ignores_sigterm_is_killed_after_the_drain() -> None:
    recorder = Recorder()
    supervisor = a_supervisor(recorder, a_process("prefill", STUBBORN), drain_s=0.0)
    async with running(supervisor):
        await recorder.until(lambda seen: len(seen.all_pids()) == 1)
    assert alive(recorder.all_pids()) == []


async def test_a_killed_worker_is_started_again_and_the_others_live_on() -> None:
    recorder = Recorder()
    supervisor = a_supervisor(recorder, a_process("gateway", SERVE), a_process("prefill", SERVE))
    async with running(supervisor):
        await recorder.until(lambda seen: len(seen.all_pids()) == 2)
        supervisor.system_is_ready()
        os.kill(recorder.pids["prefill"][0], signal.SIGKILL)
        await recorder.until(lambda seen: len(seen.pids["prefill"]) == 2)
        assert alive(recorder.pids["gateway"]) == recorder.pids["gateway"]
    assert recorder.restarts == [("prefill", "prefill ended (killed by SIGKILL)")]
    assert alive(recorder.all_pids()) == []


async def test_a_failure_to_start_ends_everything_and_says_why() -> None:
    recorder = Recorder()
    supervisor = a_supervisor(recorder, a_process("gateway", SERVE), a_process("prefill", BROKEN))
    with pytest.raises(SystemFailed, match=r"^prefill: no weights at /nowhere$"):
        await supervisor.run(anyio.Event())
    assert alive(recorder.all_pids()) == []


async def test_a_process_that_ends_while_starting_ends_everything() -> None:
    recorder = Recorder()
    supervisor = a_supervisor(recorder, a_process("gateway", SERVE), a_process("prefill", CRASH))
    with pytest.raises(SystemFailed, match=r"prefill ended \(exit code 3\) while starting"):
        await supervisor.run(anyio.Event())
    assert alive(recorder.all_pids()) == []


async def test_a_worker_that_keeps_ending_stops_the_system() -> None:
    recorder = Recorder()
    supervisor = a_supervisor(recorder, a_process("gateway", SERVE), a_process("prefill", CRASH))
    supervisor.system_is_ready()
    with pytest.raises(SystemFailed, match="more than 2 restarts of prefill within 60 s"):
        await supervisor.run(anyio.Event())
    assert len(recorder.restarts) == 2
    assert alive(recorder.all_pids()) == []


async def test_kill_ends_a_drain_at_once() -> None:
    recorder = Recorder()
    supervisor = a_supervisor(recorder, a_process("prefill", STUBBORN), drain_s=3600.0)
    async with running(supervisor) as stop:
        await recorder.until(lambda seen: len(seen.all_pids()) == 1)
        stop.set()
        await anyio.lowlevel.checkpoint()
        supervisor.kill()
    assert alive(recorder.all_pids()) == []


LAUNCHER = """
import sys, anyio
from deploy.processes import Command
from deploy.settings import LauncherSettings
from deploy.supervisor import Supervisor

class Printer:
    def reported(self, process, report):
        print(report.fields["pid"], flush=True)
    def restarting(self, process, reason, pause_s):
        pass

def command(name):
    return Command(name=name, argv=(sys.executable, "-c", sys.argv[1]))

supervisor = Supervisor(
    [[command("a")], [command("b")]], settings=LauncherSettings(), drain_s=60, observer=Printer()
)
anyio.run(supervisor.run, anyio.Event())
"""


def test_children_end_when_the_launcher_is_killed() -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, STUBBORN], stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    with launcher.stdout as lines:
        children = [psutil.Process(int(lines.readline())) for _ in range(2)]
        launcher.kill()
        launcher.wait()
    _, still_there = psutil.wait_procs(children, timeout=DEADLINE_S)
    assert still_there == []


def test_restarts_pause_longer_each_time_and_end() -> None:
    budget = RestartBudget(max_restarts=3, window_s=60.0)
    pauses = [budget.pause_s(now) for now in (0.0, 1.0, 2.0, 3.0)]
    assert pauses[:3] == sorted(pause for pause in pauses[:3] if pause is not None)
    assert len(set(pauses[:3])) == 3
    assert pauses[3] is None


def test_old_restarts_are_forgotten() -> None:
    budget = RestartBudget(max_restarts=1, window_s=60.0)
    assert budget.pause_s(0.0) is not None
    assert budget.pause_s(59.0) is None
    assert budget.pause_s(60.0) is not None
