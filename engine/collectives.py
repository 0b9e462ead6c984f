"""The ranks of one decode worker, seen from one of them, and what they exchange.

``StepGroup`` is one connected life of the ranks: any failed collective raises ``WorkerLost``, ends
it on every rank, and ``engine.rendezvous`` forms the next one. ``ExpertGroup`` is what MoE layers
hold for life: it stays the same object when the processes behind the other ranks change. What is
exchanged, and why, is unknown here.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from protocol.errors import WorkerLost


class Backend(Protocol):
    """What is used of ``torch.distributed``'s backends (gloo, NCCL)."""

    def alltoall_base(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        opts: dist.AllToAllOptions,
    ) -> dist.Work: ...

    def gather(
        self,
        output_tensors: list[list[Tensor]],
        input_tensors: list[Tensor],
        opts: dist.GatherOptions,
    ) -> dist.Work: ...

    def broadcast(self, tensors: list[Tensor], opts: dist.BroadcastOptions) -> dist.Work: ...

    def abort(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RankConnection:
    """``control`` carries step rows in host memory, ``experts`` carries rows of the device.

    They are one and the same on CPU. ``store`` is held because on rank 0 it serves the others.
    """

    control: Backend
    experts: Backend
    store: Store


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingRows:
    """Rows on their way to this rank."""

    rows: Tensor
    work: dist.Work | None  # None: they came from this rank itself

    def wait(self) -> Tensor:
        """The received rows, ordered by source rank.

        Raises:
            WorkerLost: a rank failed or did not answer in time; the exchange is dead.
        """
        if self.work is not None:
            with losing("exchange of expert rows"):
                self.work.wait()
        return self.rows


class ExpertGroup:
    """One rank's seat among the ranks that share the experts.

    Ranks keep their numbers for life. ``members`` are those that are connected now, in ascending
    order; who is absent takes part in nothing. One member alone needs no process group. More
    exchange rows only between ``connect`` and ``disconnect``, and only in a step that
    ``begin_step`` has announced.
    """

    def __init__(self, *, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.members = tuple(range(world_size))
        self._backend: Backend | None = None
        self._connected = False
        self._tokens_of_member: tuple[int, ...] = ()

    @classmethod
    def single(cls, device: torch.device) -> "ExpertGroup":
        return cls(rank=0, world_size=1, device=device)

    @property
    def place(self) -> int:
        """Of this rank among the members."""
        return self.members.index(self.rank)

    @property
    def num_members(self) -> int:
        return len(self.members)

    def connect(self, members: Sequence[int], backend: Backend | None) -> None:
        """``backend`` has the members in order; it is None where this rank is the only one."""
        assert self.rank in members
        assert (backend is None) == (len(members) == 1)
        self.members = tuple(members)
        self._backend = backend
        self._connected = True

    def disconnect(self) -> None:
        self._backend = None
        self._connected = False
        self._tokens_of_member = ()

    def begin_step(self, tokens_of_member: Sequence[int]) -> None:
        """Say how many tokens each member brings to every MoE layer of the step that now starts.

        All members must say the same: it decides the shape of every exchange.
        """
        assert len(tokens_of_member) == self.num_members
        self._tokens_of_member = tuple(tokens_of_member)

    @property
    def tokens_of_member(self) -> tuple[int, ...]:
        return self._tokens_of_member

    def exchange_rows(
        self, rows_RW: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> PendingRows:
        """Send ``send_counts[n]`` consecutive rows to each member n; returns at once.

        All members call it in the same order, and what one says it sends the other says it
        receives.

        Raises:
            WorkerLost: the ranks are not connected.
        """
        if not self._connected:
            raise WorkerLost("the ranks of this decode worker are not connected", stage="decode")
        if self._backend is None:
            return PendingRows(rows=rows_RW, work=None)
        received = rows_RW.new_empty(sum(receive_counts), rows_RW.shape[1])
        with losing("exchange of expert rows"):
            work = self._backend.alltoall_base(
                received,
                rows_RW.contiguous(),
                list(receive_counts),
                list(send_counts),
                dist.AllToAllOptions(),
            )
        return PendingRows(rows=received, work=work)


class StepGroup:
    """One connected life of the ranks of a decode worker, or of those that are left of them.

    ``epoch`` is larger than that of every earlier life any of the members has seen. Calls come
    from one thread, the engine thread.
    """

    def __init__(
        self,
        expert_group: ExpertGroup,
        *,
        epoch: int,
        members: Sequence[int],
        connection: RankConnection | None,
    ) -> None:
        """``connection`` is None for a rank that is the only member."""
        self.expert_group = expert_group
        self.epoch = epoch
        self.members = tuple(members)
        self._open = True
        self._connection = connection
        expert_group.connect(members, None if connection is None else connection.experts)

    @property
    def rank(self) -> int:
        return self.expert_group.rank

    @property
    def place(self) -> int:
        return self.expert_group.place

    @property
    def num_members(self) -> int:
        return len(self.members)

    def exchange(self, row: Sequence[int]) -> list[tuple[int, ...]]:
        """Every member's row, in the order of ``members``. Blocks until all have called it.

        Rows have the same width on all ranks. Gather and broadcast: on gloo an all-gather is a
        ring, ten times slower at 72 ranks.

        Raises:
            WorkerLost: a rank failed or did not come within the collective timeout. The group is
                closed; form the next one.
        """
        if not self._open:
            raise WorkerLost("the ranks of this decode worker are not connected", stage="decode")
        if self._connection is None:
            return [tuple(row)]
        mine = torch.tensor(row, dtype=torch.int64)
        rows = mine.new_empty(self.num_members, len(row))
        gather, broadcast = dist.GatherOptions(), dist.BroadcastOptions()
        gather.rootRank = broadcast.rootRank = 0
        control = self._connection.control
        try:
            with losing(f"exchange of step rows in epoch {self.epoch}"):
                outputs = [list(rows.unbind(0))] if self.place == 0 else []
                control.gather(outputs, [mine], gather).wait()
                control.broadcast([rows], broadcast).wait()
        except WorkerLost:
            self.close()
            raise
        return [tuple(line) for line in rows.tolist()]

    def close(self) -> None:
        """Disconnect. Peers that wait for this rank fail at once instead of at their timeout.

        Call it after any ``WorkerLost``, also one from an expert layer. Calling it twice is fine.
        """
        if self._open:
            self._open = False
            self.expert_group.disconnect()
        if self._connection is not None:
            self._connection.experts.abort()
            if self._connection.control is not self._connection.experts:
                self._connection.control.abort()
            self._connection = None


@contextmanager
def losing(what: str) -> Generator[None]:
    """Failed collectives raise plain ``RuntimeError``; here they mean that a rank is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise WorkerLost(f"a rank was lost during the {what}: {reason}", stage="decode") from error
