"""The actor that runs one process of headrace on the node where Ray has placed it.

It starts the process and passes on what it reports; whether a process that has ended starts again
is the driver's to say. When Ray ends the actor, however that happens, the process ends too. No
token and no KV passes here. There is no event loop here either: Ray's would be in its way.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from ray.util import get_node_ip_address

from deploy.preflight import free_port
from deploy.processes import Lifeline, Report, parse_report
from runtime.settings import child_environment


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an actor runs; ``port`` was free there a moment ago."""

    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """``code`` is negative for the signal that ended the process."""

    code: int


class RoleHost:
    """Needs three threads of Ray's: one serves, the others answer."""

    def __init__(self) -> None:
        self._lifeline = Lifeline()
        self._lock = threading.Lock()
        self._stopped = 0  # lives up to this one are not to run
        self._process: subprocess.Popen[bytes] | None = None

    def place(self) -> Place:
        """This node's address as other nodes know it, and a free port."""
        host = get_node_ip_address()
        return Place(host=host, port=free_port(host))

    def serve(self, life: int, arguments: Sequence[str]) -> Generator[Report | Ended]:
        """Run ``headrace ARGUMENTS`` to its end, and give what it reports.

        ``life`` grows whenever the driver means another start than the one it has told to stop.
        """
        # -P: the folder that the actor stands in must not shadow our packages
        argv = (sys.executable, "-P", "-m", "deploy.cli", *arguments)
        started = self._start(life, argv)
        if started is None:
            yield Ended(code=0)
            return
        process, reports = started
        with reports:
            for line in reports:
                if (report := parse_report(line)) is not None:
                    yield report
        yield Ended(code=process.wait())

    def stop(self, life: int, *, at_once: bool) -> None:
        """Let the process of ``serve(life)`` drain and end, also one that is yet to come."""
        with self._lock:
            self._stopped = max(self._stopped, life)
            process = self._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL if at_once else signal.SIGTERM)

    def _start(
        self, life: int, argv: Sequence[str]
    ) -> tuple[subprocess.Popen[bytes], BinaryIO] | None:
        with self._lock:
            if life <= self._stopped:
                return None
            reading, writing = os.pipe()
            try:
                self._process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    env=child_environment(report_fd=writing, parent_fd=self._lifeline.reading),
                    start_new_session=True,
                    pass_fds=(writing, self._lifeline.reading),
                )
            except OSError:
                os.close(reading)
                raise
            finally:
                os.close(writing)
            return self._process, os.fdopen(reading, "rb")
