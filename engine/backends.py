"""What carries rows between the ranks of one life: chosen alike on all of them, and connected.

On a CPU that is memory that they share, where all of them are on one host, and else gloo. GPUs
exchange expert rows over NCCL, and step rows, which are in host memory, over gloo. How ranks find
one another, and what they exchange, is unknown here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from engine.collectives import Alone, Backend, RankConnection
from engine.cpu import channels
from engine.one_host.joining import join
from engine.one_host.segment import Life
from engine.one_host.whereabouts import here, host
from protocol.errors import ConfigError

RowsChoice = Literal["auto", "shared_memory", "gloo"]


def alone() -> RankConnection:
    backend = Alone()
    return RankConnection(control=backend, experts=backend, store=None, rows="none")


def terms_of(role: str, choice: RowsChoice) -> dict[str, str]:
    """What must be equal on ranks that are to meet with this choice.

    Raises:
        ConfigError: this host has no shared memory, and nothing else was to be used.
    """
    name = f"{role}.group.rows"
    if choice != "shared_memory":
        return {name: choice}
    try:
        return {name: f"shared_memory on {host()}"}
    except OSError as error:
        raise ConfigError(f"{name} shared_memory: {error}; set it to auto") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Backends:
    """One rank's way to connections. A rank that keeps the others waiting for longer than
    ``collective_timeout_s`` counts as lost; ``attempt_s`` bounds the making of connections.
    """

    role: str  # whose settings these are
    device: torch.device
    choice: RowsChoice
    collective_timeout_s: float
    attempt_s: float

    def prepare(self) -> None:
        """Compile what connections may need, which takes seconds where it never was; when ranks
        have met, others would wait for it.
        """
        if self.device.type != "cuda" and self.choice != "gloo" and channels.FUTEX is not None:
            channels.advance()
            channels.leave()

    def connect(
        self, store: Store, *, epoch: int, number: int, members: Sequence[int], rank: int, host: str
    ) -> RankConnection:
        """Members of the same ``epoch`` and ``number`` meet at the lowest one's ``store``; others
        never come by this life. ``rank`` is this one's place among ``members``, ``host`` the
        address of its interface.

        Raises:
            RuntimeError: a member does not answer.
            ConfigError: memory was to be shared, and cannot be.
        """
        life = PrefixStore(f"{epoch}/{number}", store)
        why = f"{self.role}.group.rows is {self.choice}"
        if self.device.type == "cuda":
            why = "ranks are on GPUs"
        elif self.choice != "gloo":
            shared = join(
                PrefixStore("rows", life),
                Life(epoch=epoch, number=number, size=len(members)),
                rank=rank,
                seats=members,
                where=here(),
                timeout_s=self.collective_timeout_s,
            )
            if not isinstance(shared, str):
                return RankConnection(
                    control=shared, experts=shared, store=store, rows="shared memory"
                )
            if self.choice == "shared_memory":
                raise ConfigError(f"{self.role}.group.rows shared_memory: {shared}; set it to auto")
            why = shared
        control = self._gloo(PrefixStore("control", life), rank, len(members), host)
        experts = control
        if self.device.type == "cuda":
            experts = self._nccl(PrefixStore("experts", life), rank, len(members))
        return RankConnection(control=control, experts=experts, store=store, rows=f"gloo: {why}")

    def _gloo(self, store: Store, rank: int, size: int, host: str) -> Backend:
        gloo: Any = dist.ProcessGroupGloo  # its stubs lack the options that it needs
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=host)]
        options._timeout = timedelta(seconds=self.attempt_s)
        options._threads = 2
        backend = gloo(store, rank, size, options)
        backend._set_default_timeout(timedelta(seconds=self.collective_timeout_s))
        connected: Backend = backend
        return connected

    def _nccl(self, store: Store, rank: int, size: int) -> Backend:
        nccl: Any = dist.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = timedelta(seconds=self.collective_timeout_s)
        connected: Backend = nccl(store, rank, size, options)
        return connected
