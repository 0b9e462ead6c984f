"""Faults that are put into a local system while it is measured.

The system is found from the URL: whoever listens on its port, and the launcher that started it. A
fault takes one process of a role, the last by its number. Only processes of this machine that
belong to that launcher are ever touched.
"""

import re
import signal
from collections.abc import Iterator
from urllib.parse import urlsplit

import anyio
import msgspec
import psutil

from capacity.load.errors import LoadError, WrongOption

_ROLES = ("gateway", "scheduler", "prefill", "decode")
_FORM = re.compile(r"(kill|pause)\s+([a-z]+)\s*@\s*([0-9.]+)\s*s(?:\s+for\s+([0-9.]+)\s*s)?")
_PAUSE_S = 3.0
_EXAMPLE = "write 'kill decode@30s' or 'pause prefill@10s for 3s'"
_COMMAND = ("headrace", "deploy.cli")


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """``at_s`` counts from the start of the load."""

    action: str
    role: str
    at_s: float
    pause_s: float = 0.0

    @property
    def text(self) -> str:
        lasting = f" for {self.pause_s:g} s" if self.pause_s else ""
        return f"{self.action} {self.role} at {self.at_s:g} s{lasting}"


def parse_fault(written: str) -> Fault:
    """
    Raises:
        WrongOption: it is none of the forms.
    """
    found = _FORM.fullmatch(written.strip().lower())
    if found is None:
        raise WrongOption(f"--fault {written!r}: {_EXAMPLE}")
    action, role, at, lasting = found.groups()
    if role not in _ROLES:
        raise WrongOption(
            f"--fault {written!r}: {role!r} is no role; roles are {', '.join(_ROLES)}"
        )
    if lasting and action == "kill":
        raise WrongOption(f"--fault {written!r}: only a pause lasts; {_EXAMPLE}")
    pause_s = (float(lasting) if lasting else _PAUSE_S) if action == "pause" else 0.0
    return Fault(action=action, role=role, at_s=float(at), pause_s=pause_s)


def victims(url: str, role: str) -> list[psutil.Process]:
    """The processes of ``role`` in the local system that serves ``url``.

    Raises:
        LoadError: no launcher of a local system serves there, or it has no such process.
    """
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    launcher = _launcher(port)
    if launcher is None:
        raise LoadError(
            f"--fault needs a system that `headrace up` started on this machine; none serves {url}"
        )
    found = [child for child in launcher.children(recursive=True) if role in _words(child)]
    if not found:
        raise LoadError(f"--fault: the system at {url} has no {role} process of its own")
    return found


async def inject(fault: Fault, process: psutil.Process) -> None:
    """Do it now; a pause ends even when the test is stopped meanwhile."""
    if fault.action == "kill":
        process.send_signal(signal.SIGKILL)
        return
    process.send_signal(signal.SIGSTOP)
    try:
        await anyio.sleep(fault.pause_s)
    finally:
        process.send_signal(signal.SIGCONT)


def _launcher(port: int) -> psutil.Process | None:
    """The topmost of the command's processes above whoever listens on ``port``."""
    for listener in _listeners(port):
        line = [listener, *listener.parents()]
        ours = [process for process in line if any(word in _COMMAND for word in _words(process))]
        if ours:
            return ours[-1]
    return None


def _listeners(port: int) -> Iterator[psutil.Process]:
    for connection in psutil.net_connections("tcp"):
        if connection.status != psutil.CONN_LISTEN or not connection.laddr:
            continue
        if connection.laddr.port == port and connection.pid is not None:
            yield psutil.Process(connection.pid)


def _words(process: psutil.Process) -> list[str]:
    """The last part of each argument's path, so that an installed command is recognised."""
    try:
        return [argument.rpartition("/")[2] for argument in process.cmdline()]
    except psutil.Error:
        return []
