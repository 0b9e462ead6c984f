"""How the ranks of a decode worker find one another, again after each loss.

Rank 0 listens at a fixed address; any rank, rank 0 included, may be a new process. An attempt
counts only when all ranks of the same attempt have exchanged a row; whatever else happens, every
rank tries again until its deadline. Who starts the processes is unknown here.

One attempt: each rank puts a ticket (a random number and the last epoch it saw) under its rank's
name. When all tickets are there, rank 0 publishes the roll: the next epoch and the tickets. A rank
whose ticket is not on the roll has been replaced or is late, and tries again. Connections are made
under the epoch and the roll's own random number, so nothing of an earlier life can join.
"""

import errno
import secrets
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from engine.collectives import ExpertGroup, RankConnection, StepGroup
from protocol.errors import ConfigError, DeadlineExceeded, WorkerLost

_POLL_S = 0.02
_RETRY_S = 0.1
_CONNECT_S = 1.0
_PORT_GRACE_S = 2.0  # the previous rank 0 may still be on its way out
_ROLL_KEY = "roll"


@dataclass(frozen=True, slots=True, kw_only=True)
class FormingProgress:
    """What a rank waits for while its group forms."""

    missing_ranks: tuple[int, ...]  # known to rank 0 only; empty elsewhere
    last_failure: str
    waited_s: float


class _Ticket(msgspec.Struct, frozen=True, array_like=True):
    number: int
    last_epoch: int


class _Roll(msgspec.Struct, frozen=True, array_like=True):
    epoch: int
    number: int
    tickets: tuple[int, ...]


def form_group(
    rank: int,
    world_size: int,
    rendezvous: str,
    *,
    device: torch.device,
    deadline_s: float,
    last_epoch: int = 0,
    collective_timeout_s: float = 10.0,
    attempt_s: float = 10.0,
    expert_group: ExpertGroup | None = None,
    on_progress: Callable[[FormingProgress], None] = lambda _: None,
) -> StepGroup:
    """Meet the other ranks at ``rendezvous`` ("host:port" of rank 0) and connect.

    ``last_epoch`` is that of this process's previous group, 0 if it had none. A rank that keeps
    the others waiting for longer than ``collective_timeout_s`` counts as lost. ``attempt_s``
    bounds one attempt once all ranks are known. ``expert_group`` is reconnected, where layers
    already hold one; else it is made. ``on_progress`` is called about once a second.

    Raises:
        DeadlineExceeded: not all ranks came within ``deadline_s``; the message names who is known
            to be missing, and the last failure.
        ConfigError: ``rendezvous`` is not an address, or not one of this host on rank 0.
    """
    group = expert_group or ExpertGroup(rank=rank, world_size=world_size, device=device)
    assert (group.rank, group.world_size) == (rank, world_size)
    if world_size == 1:
        return StepGroup(group, epoch=last_epoch + 1, connection=None)
    host, port = _parse(rendezvous)
    waiting = _Waiting(deadline_s, on_progress)
    while True:
        attempt = _Attempt(
            group=group,
            host=host,
            port=port,
            ticket=_Ticket(secrets.randbits(62), last_epoch),
            attempt_s=attempt_s,
            collective_timeout_s=collective_timeout_s,
            waiting=waiting,
        )
        try:
            return attempt.run()
        except WorkerLost as error:
            group.disconnect()
            waiting.last_failure = str(error)
            waiting.pause(_RETRY_S)


class _Waiting:
    """The deadline, and the reports on the way to it."""

    def __init__(self, deadline_s: float, on_progress: Callable[[FormingProgress], None]) -> None:
        self._start = time.monotonic()
        self._deadline_s = deadline_s
        self._on_progress = on_progress
        self._reported_s = 0.0
        self.missing_ranks: tuple[int, ...] = ()
        self.last_failure = ""

    def waited_s(self) -> float:
        return time.monotonic() - self._start

    def pause(self, seconds: float) -> None:
        waited_s = self.waited_s()
        if waited_s >= self._deadline_s:
            missing = ", ".join(map(str, self.missing_ranks)) or "not known here"
            raise DeadlineExceeded(
                f"the decode ranks did not all meet within {self._deadline_s:g} s; missing ranks: "
                f"{missing}; last failure: {self.last_failure or 'none'}",
                stage="decode",
            )
        if waited_s - self._reported_s >= 1.0:
            self._reported_s = waited_s
            self._on_progress(
                FormingProgress(
                    missing_ranks=self.missing_ranks,
                    last_failure=self.last_failure,
                    waited_s=waited_s,
                )
            )
        time.sleep(seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    group: ExpertGroup
    host: str
    port: int
    ticket: _Ticket
    attempt_s: float
    collective_timeout_s: float
    waiting: _Waiting

    def run(self) -> StepGroup:
        """
        Raises:
            WorkerLost: this attempt came to nothing.
        """
        rank = self.group.rank
        with _failing("meeting"):
            store = self._serve() if rank == 0 else self._connect()
            store.set(f"ticket/{rank}", msgspec.json.encode(self.ticket).decode())
            roll = self._call_roll(store) if rank == 0 else self._await_roll(store)
        if roll.tickets[rank] != self.ticket.number:
            raise WorkerLost("another process has taken this rank's place, or it came too late")
        with _failing("connecting"):
            connection = self._open(store, f"{roll.epoch}/{roll.number}")
        step_group = StepGroup(self.group, epoch=roll.epoch, connection=connection)
        rows = step_group.exchange([roll.epoch])
        assert rows == [(roll.epoch,)] * self.group.world_size
        return step_group

    def _serve(self) -> Store:
        # A socket of our own: the store by itself would listen on every interface.
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((self.host, self.port))
            except OSError as error:
                self._explain(error)
                raise
            return TCPStore(
                self.host,
                self.port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=self.attempt_s),
                master_listen_fd=listener.detach(),
            )

    def _explain(self, error: OSError) -> None:
        """Raise what only an operator can change; what may pass by itself is tried again."""
        where = f"rank 0 cannot listen at {self.host}:{self.port} for the other decode ranks"
        if error.errno == errno.EADDRINUSE and self.waiting.waited_s() > _PORT_GRACE_S:
            raise ConfigError(
                f"{where}: the port is in use; stop what listens there or choose another port"
            ) from error
        if error.errno in {errno.EADDRNOTAVAIL, errno.EACCES}:
            raise ConfigError(
                f"{where}: {error.strerror}; choose an address of this host and a port above 1023"
            ) from error

    def _connect(self) -> Store:
        store = TCPStore(
            self.host,
            self.port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=min(_CONNECT_S, self.attempt_s)),
        )
        store.set_timeout(timedelta(seconds=self.attempt_s))
        return store

    def _call_roll(self, store: Store) -> _Roll:
        keys = [f"ticket/{rank}" for rank in range(self.group.world_size)]
        while True:
            missing = tuple(rank for rank, key in enumerate(keys) if not store.check([key]))
            self.waiting.missing_ranks = missing
            if not missing:
                break
            self.waiting.pause(_POLL_S)
        tickets = [msgspec.json.decode(store.get(key), type=_Ticket) for key in keys]
        roll = _Roll(
            epoch=max(ticket.last_epoch for ticket in tickets) + 1,
            number=secrets.randbits(62),
            tickets=tuple(ticket.number for ticket in tickets),
        )
        store.set(_ROLL_KEY, msgspec.json.encode(roll).decode())
        return roll

    def _await_roll(self, store: Store) -> _Roll:
        while not store.check([_ROLL_KEY]):
            self.waiting.pause(_POLL_S)
        return msgspec.json.decode(store.get(_ROLL_KEY), type=_Roll)

    def _open(self, store: Store, prefix: str) -> RankConnection:
        store_of_life = PrefixStore(prefix, store)
        rank, world_size = self.group.rank, self.group.world_size
        gloo: Any = dist.ProcessGroupGloo  # its stubs lack the options that it needs
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=self._own_address())]
        options._timeout = timedelta(seconds=self.attempt_s)
        options._threads = 2
        control = gloo(PrefixStore("control", store_of_life), rank, world_size, options)
        control._set_default_timeout(timedelta(seconds=self.collective_timeout_s))
        if self.group.device.type != "cuda":
            return RankConnection(control=control, experts=control, store=store)
        nccl: Any = dist.ProcessGroupNCCL
        nccl_options = nccl.Options()
        nccl_options._timeout = timedelta(seconds=self.collective_timeout_s)
        experts = nccl(PrefixStore("experts", store_of_life), rank, world_size, nccl_options)
        return RankConnection(control=control, experts=experts, store=store)

    def _own_address(self) -> str:
        """The address of the interface that reaches rank 0; peers connect to it."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((self.host, self.port))  # sends nothing
            return str(probe.getsockname()[0])


def _parse(rendezvous: str) -> tuple[str, int]:
    host, _, port = rendezvous.rpartition(":")
    host = host.strip("[]")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"rendezvous must be host:port of rank 0, such as 127.0.0.1:29500, not {rendezvous!r}"
        ) from error
    # Every rank must settle on the same of several addresses: IPv4, which is seldom switched off.
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return str(found[0][4][0]), int(port)


@contextmanager
def _failing(stage: str) -> Generator[None]:
    """Stores and backends raise plain ``RuntimeError`` and ``OSError`` for whatever goes wrong."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WorkerLost(f"{stage} failed: {reason}", stage="decode") from error
