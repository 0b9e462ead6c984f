"""Where a process is, as far as others must know to share its memory and to notice its death.

Two processes are on one host when they are under one kernel that has not been started again, see
one another's numbers, and belong to one user. Containers and virtual machines of one machine are
several hosts.
"""

import os
import platform
import select
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from engine.cpu.channels import FUTEX


class Whereabouts(msgspec.Struct, frozen=True, kw_only=True):
    """``started`` is in clock ticks since the kernel's start: numbers are given out again."""

    host: str
    pid: int
    started: int


def here() -> Whereabouts:
    """This process's. Its host is that of no other process where memory cannot be shared."""
    pid = os.getpid()
    try:
        return Whereabouts(host=host(), pid=pid, started=_started(pid))
    except OSError as error:
        return Whereabouts(host=f"unknown: {error}", pid=pid, started=0)


def host() -> str:
    """Equal in two processes that can share memory.

    Raises:
        OSError: this system does not say, or lacks what sharing needs.
    """
    if FUTEX is None:
        raise OSError(f"{platform.system()} on {platform.machine()} is not supported")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    numbers, users = (os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("pid", "user"))
    return f"{boot}/{numbers}/{users}/{os.geteuid()}"


def is_known(whereabouts: Whereabouts) -> bool:
    return not whereabouts.host.startswith("unknown")


class Mourner:
    """Notices that processes have ended, whatever process has their number since."""

    def __init__(self, processes: Mapping[int, Whereabouts]) -> None:
        """``processes`` by rank.

        Raises:
            OSError: one of them has ended already, or cannot be watched.
        """
        self._poll = select.poll()
        self._rank_of: dict[int, int] = {}
        try:
            for rank, process in processes.items():
                watch = os.pidfd_open(process.pid)
                self._rank_of[watch] = rank
                self._poll.register(watch, select.POLLIN)
                if _started(process.pid) != process.started:
                    raise ProcessLookupError(f"process {process.pid} has ended")
        except OSError:
            self.close()
            raise

    def ended(self) -> list[int]:
        """Ranks whose processes have ended; told once."""
        found = [self._rank_of[watch] for watch, _ in self._poll.poll(0)]
        for watch, rank in list(self._rank_of.items()):
            if rank in found:
                self._forget(watch)
        return found

    def close(self) -> None:
        for watch in list(self._rank_of):
            self._forget(watch)

    def _forget(self, watch: int) -> None:
        del self._rank_of[watch]
        with suppress(KeyError):
            self._poll.unregister(watch)
        os.close(watch)


def _started(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    return int(stat.rpartition(")")[2].split()[19])
