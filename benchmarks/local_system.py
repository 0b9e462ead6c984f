"""A whole system in processes of its own, for benchmarks and end-to-end tests.

It is what a user starts: ``headrace up`` with flags, stopped by Ctrl-C.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from runtime.settings import PARENT_FD

START_S = 180.0
STOP_S = 30.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSystem:
    url: str
    launcher: subprocess.Popen[bytes]
    log: Path

    def processes(self, role: str) -> list[psutil.Process]:
        """The living processes that run ``role``: gateway, prefill or decode."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.launcher.pid).children(recursive=True)
            return [child for child in children if role in _arguments(child)]
        return []

    def pin(self, role: str, cpus: Sequence[int]) -> None:
        """Keep all threads of the role's processes on the given cores."""
        for process in self.processes(role):
            for thread in process.threads():
                os.sched_setaffinity(thread.id, cpus)

    def output(self) -> str:
        return self.log.read_text(errors="replace")


@contextlib.contextmanager
def running_system(
    model: str, *flags: str, environment: dict[str, str] | None = None
) -> Iterator[LocalSystem]:
    """``headrace up MODEL FLAGS...`` on a free port, ready to serve.

    Raises:
        RuntimeError: it did not become ready, or left processes behind; the text has its output.
    """
    inherited = os.environ | (environment or {})  # noqa: TID251  a child's, not our settings
    port = free_port()
    command = [sys.executable, "-m", "deploy.cli", "up", model, "--port", str(port), *flags]
    # The launcher dies with whoever holds the writing end: also when this process is killed.
    lifeline, held = os.pipe()
    with tempfile.TemporaryDirectory(prefix="headrace-") as folder, os.fdopen(held, "wb"):
        log = Path(folder) / "log"
        with log.open("wb") as output, os.fdopen(lifeline, "rb"):
            launcher = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=inherited | {PARENT_FD: str(lifeline)},
                pass_fds=(lifeline,),
                start_new_session=True,
            )
        system = LocalSystem(url=f"http://127.0.0.1:{port}", launcher=launcher, log=log)
        try:
            _wait_until_ready(system)
            yield system
        finally:
            _stop(system)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(system: LocalSystem) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if system.launcher.poll() is not None:
            raise RuntimeError(f"the system ended while starting:\n{system.output()}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{system.url}/ready", timeout=2.0).status_code == httpx.codes.OK:
                return
        time.sleep(POLL_S)
    raise RuntimeError(f"the system is not ready after {START_S} s:\n{system.output()}")


def _stop(system: LocalSystem) -> None:
    everyone: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        everyone = psutil.Process(system.launcher.pid).children(recursive=True)
    if system.launcher.poll() is None:
        system.launcher.send_signal(signal.SIGINT)
    try:
        system.launcher.wait(STOP_S)
    except subprocess.TimeoutExpired:
        system.launcher.kill()
        system.launcher.wait()
        raise RuntimeError(f"Ctrl-C did not stop the system:\n{system.output()}") from None
    finally:
        _, left = psutil.wait_procs(everyone, timeout=5)
        for process in left:
            process.kill()
    if left:
        raise RuntimeError(f"left behind: {[process.cmdline() for process in left]}")


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
