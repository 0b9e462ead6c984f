"""Child processes of this machine: started, listened to, ended.

A child runs in a session of its own, so Ctrl-C in a terminal reaches the launcher alone. It holds
the reading end of a pipe whose writing end only the launcher has: when the launcher ends, however
that happens, the child ends too (``runtime.parent``). This module does not know roles.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

import anyio
from anyio.abc import Process

from runtime.settings import child_environment

_MAX_UNREAD_BYTES = 1 << 16
_KILL_WAIT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """``name`` is what people call the process: gateway, prefill-0, decode-0/3."""

    name: str
    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One line of ``runtime.reporting``."""

    event: str
    fields: Mapping[str, object]


class Lifeline:
    """The pipe whose end tells all children that the launcher has ended."""

    def __init__(self) -> None:
        self.reading, self._writing = os.pipe()

    def close(self) -> None:
        os.close(self.reading)
        os.close(self._writing)


class Child:
    def __init__(self, name: str, process: Process, reports: int) -> None:
        self.name = name
        self._process = process
        self._reports = reports

    @classmethod
    async def start(cls, command: Command, lifeline: Lifeline) -> "Child":
        """The child's stdin is empty, and its stdout goes to our stderr: ours is for data."""
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        try:
            with anyio.CancelScope(shield=True):  # a process must not exist without its owner
                process = await anyio.open_process(
                    command.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=sys.stderr.fileno(),
                    stderr=None,
                    env=child_environment(report_fd=writing, parent_fd=lifeline.reading),
                    start_new_session=True,
                    pass_fds=(writing, lifeline.reading),
                )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        return cls(command.name, process, reading)

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    @property
    def exit_code(self) -> int | None:
        return self._process.returncode

    async def wait(self) -> int:
        """The exit code; negative for the signal that ended it."""
        return await self._process.wait()

    async def reports(self) -> AsyncGenerator[Report]:
        """What the child tells, until it has ended. Iterate it once, to the end."""
        unread = b""
        try:
            while len(unread) < _MAX_UNREAD_BYTES:
                await anyio.wait_readable(self._reports)
                try:
                    part = os.read(self._reports, 4096)
                except BlockingIOError:
                    continue
                if not part:
                    return
                *lines, unread = (unread + part).split(b"\n")
                for line in lines:
                    if (report := parse_report(line)) is not None:
                        yield report
        finally:
            os.close(self._reports)

    def terminate(self) -> None:
        """Ask the child to drain and end."""
        if self.running:
            self._process.terminate()

    def kill(self) -> None:
        """End the child and whatever it has started, at once."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def stop(self, grace_s: float) -> None:
        """Terminate, and kill what has not ended after ``grace_s`` seconds."""
        self.terminate()
        with anyio.move_on_after(grace_s):
            await self.wait()
        self.kill()
        with anyio.move_on_after(_KILL_WAIT_S, shield=True):
            await self.wait()


def parse_report(line: bytes) -> Report | None:
    """None for a line that is none."""
    try:
        fields = json.loads(line)
        return Report(event=fields.pop("event"), fields=fields)
    except (ValueError, KeyError, AttributeError, TypeError):
        return None


def describe_exit(code: int) -> str:
    """``killed by SIGKILL`` or ``exit code 1``."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
