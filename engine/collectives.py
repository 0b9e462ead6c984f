"""The ranks of one decode worker, seen from one of them, and what they exchange.

``StepGroup`` is one connected life of the ranks: any failed collective raises ``WorkerLost``, ends
it on every rank, and ``engine.rendezvous`` forms the next one. ``ExpertGroup`` is what MoE layers
hold for life: it stays the same object when the processes behind the other ranks change. What is
exchanged, and why, is unknown here.
"""

import math
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, Store

from protocol.errors import WorkerLost


class Awaited(Protocol):
    def wait(self) -> bool: ...


class Backend(Protocol):
    """What is used of ``torch.distributed``'s backends, and ``engine.one_host`` does as well."""

    def alltoall_base(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        opts: dist.AllToAllOptions,
    ) -> Awaited: ...

    def _allgather_base(self, output: Tensor, input: Tensor, opts: AllgatherOptions) -> Awaited: ...

    def _reduce_scatter_base(
        self, output: Tensor, input: Tensor, opts: dist.ReduceScatterOptions
    ) -> Awaited: ...

    def gather(
        self,
        output_tensors: list[list[Tensor]],
        input_tensors: list[Tensor],
        opts: dist.GatherOptions,
    ) -> Awaited: ...

    def broadcast(self, tensors: list[Tensor], opts: dist.BroadcastOptions) -> Awaited: ...

    def abort(self) -> None: ...


class _Done:
    def wait(self) -> bool:
        return True


class Alone:
    """The backend of a rank that is the only member: what it sends, it receives."""

    def alltoall_base(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        opts: dist.AllToAllOptions,
    ) -> Awaited:
        output.copy_(input)
        return _Done()

    def _allgather_base(self, output: Tensor, input: Tensor, _: AllgatherOptions) -> Awaited:
        output.copy_(input)
        return _Done()

    def _reduce_scatter_base(
        self,
        output: Tensor,
        input: Tensor,
        _: dist.ReduceScatterOptions,
    ) -> Awaited:
        output.copy_(input)
        return _Done()

    def gather(
        self,
        output_tensors: list[list[Tensor]],
        input_tensors: list[Tensor],
        opts: dist.GatherOptions,
    ) -> Awaited:
        output_tensors[0][0].copy_(input_tensors[0])
        return _Done()

    def broadcast(self, tensors: list[Tensor], opts: dist.BroadcastOptions) -> Awaited:
        return _Done()

    def abort(self) -> None:
        pass


@dataclass(frozen=True, slots=True, kw_only=True)
class RankConnection:
    """``control`` carries step rows in host memory, ``experts`` carries rows of the device.

    They are one and the same on CPU. ``store`` is held because on rank 0 it serves the others; None
    for a rank alone. ``rows`` tells people what carries them, and why.
    """

    control: Backend
    experts: Backend
    store: Store | None
    rows: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingRows:
    """Rows on their way to this rank."""

    rows: Tensor
    work: Awaited

    def wait(self) -> Tensor:
        """The received rows, ordered by source rank.

        Raises:
            WorkerLost: a rank failed or did not answer in time; the exchange is dead.
        """
        with losing("exchange of expert rows"):
            self.work.wait()
        return self.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingLines:
    """Numbers of other ranks on their way to this one, beside whatever it does."""

    lines: Tensor
    work: Awaited

    def wait(self) -> list[tuple[int, ...]]:
        """One line for each rank that this one hears; none where it only speaks.

        Raises:
            WorkerLost: a rank failed or did not answer in time.
        """
        with losing("exchange of what ranks plan"):
            self.work.wait()
        return [tuple(line) for line in self.lines.tolist()]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Watched:
    """``work`` of ``group``, which knows how long its thread has waited for others."""

    work: Awaited
    group: "ExpertGroup"

    def wait(self) -> bool:
        self.group.waited_until = math.inf
        try:
            return self.work.wait()
        finally:
            self.group.waited_until = time.monotonic()


class ExpertGroup:
    """One process's seat among those that share the experts.

    A seat is for life. Who is there takes part; ``rank`` is this one's place among ``members``, the
    seats that are taken, and ``world_size`` is their number. A seat alone needs no process group.
    More exchange rows only between ``connect`` and ``disconnect``, and only in a step that
    ``begin_step`` has announced.
    """

    def __init__(self, *, seat: int, num_seats: int, device: torch.device) -> None:
        self.seat = seat
        self.num_seats = num_seats
        self.device = device
        self.members = tuple(range(num_seats))
        self.rank = seat
        self._backend: Backend | None = None
        self._tokens_of_rank: tuple[int, ...] = ()
        self.lives = 0  # how often the ranks have been connected
        # For other ranks, by the monotonic clock; infinite while it does. Read by any thread.
        self.waited_until = -math.inf

    @classmethod
    def single(cls, device: torch.device) -> "ExpertGroup":
        return cls(seat=0, num_seats=1, device=device)

    @property
    def world_size(self) -> int:
        return len(self.members)

    def connect(self, members: Sequence[int], backend: Backend) -> None:
        """``members`` are the seats that are taken, ascending; ``backend`` has them in order."""
        self.members = tuple(members)
        self.rank = self.members.index(self.seat)
        self._backend = backend
        self.lives += 1

    def disconnect(self) -> None:
        self._backend = None
        self._tokens_of_rank = ()

    def begin_step(self, tokens_of_rank: Sequence[int]) -> None:
        """Say how many tokens each rank brings to every MoE layer of the step that now starts.

        All ranks must say the same: it decides the shape of every exchange.
        """
        assert len(tokens_of_rank) == self.world_size
        self._tokens_of_rank = tuple(tokens_of_rank)

    @property
    def tokens_of_rank(self) -> tuple[int, ...]:
        return self._tokens_of_rank

    def exchange_rows(
        self,
        rows_RW: Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        into_RW: Tensor | None = None,
    ) -> PendingRows:
        """Send ``send_counts[n]`` consecutive rows to each rank n; returns at once.

        All ranks call it in the same order, and what one says it sends the other says it receives.
        ``into_RW`` is where rows arrive; None takes new memory.

        Raises:
            WorkerLost: the ranks are not connected.
        """
        backend = self._connected()
        received = into_RW
        if received is None:
            received = rows_RW.new_empty(sum(receive_counts), rows_RW.shape[1])
        with losing("exchange of expert rows"):
            work = backend.alltoall_base(
                received,
                rows_RW.contiguous(),
                list(receive_counts),
                list(send_counts),
                dist.AllToAllOptions(),
            )
        return PendingRows(rows=received, work=_Watched(work=work, group=self))

    def gather_rows(self, rows_BW: Tensor, into_RW: Tensor) -> PendingRows:
        """Give ``rows_BW`` to all ranks, which have equally many; as ``exchange_rows``."""
        backend = self._connected()
        with losing("gathering of expert rows"):
            work = backend._allgather_base(into_RW, rows_BW.contiguous(), AllgatherOptions())
        return PendingRows(rows=into_RW, work=_Watched(work=work, group=self))

    def sum_rows(self, rows_RW: Tensor, into_BW: Tensor) -> PendingRows:
        """Add all ranks' ``rows_RW`` up; this rank gets the part of its rank, in ``into_BW``.

        The backend may add in any order. As ``exchange_rows``.
        """
        backend = self._connected()
        with losing("sum of expert rows"):
            work = backend._reduce_scatter_base(
                into_BW, rows_RW.contiguous(), dist.ReduceScatterOptions()
            )
        return PendingRows(rows=into_BW, work=_Watched(work=work, group=self))

    def _connected(self) -> Backend:
        if self._backend is None:
            raise WorkerLost("the ranks of this worker are not connected", stage="decode")
        return self._backend


class StepGroup:
    """One connected life of the seats of a worker, or of those that are taken.

    ``epoch`` is larger than that of every earlier life any of the members has seen. Calls come
    from one thread, the engine thread.
    """

    def __init__(
        self,
        expert_group: ExpertGroup,
        *,
        epoch: int,
        members: Sequence[int],
        connection: RankConnection,
    ) -> None:
        self.expert_group = expert_group
        self.epoch = epoch
        self.members = tuple(members)
        self.rows = connection.rows
        self._connection: RankConnection | None = connection
        self._inner: StepGroup | None = None
        expert_group.connect(self.members, connection.experts)

    @property
    def rank(self) -> int:
        return self.expert_group.rank

    @property
    def world_size(self) -> int:
        return len(self.members)

    def enclose(self, inner: "StepGroup") -> None:
        """``inner`` is the life that some of the members have among themselves; it ends with this
        one.
        """
        self._inner = inner

    def exchange(self, row: Sequence[int]) -> list[tuple[int, ...]]:
        """Every member's row, by rank. Blocks until all of them have called it.

        Rows have the same width on all ranks. Gather and broadcast: on gloo an all-gather is a
        ring, ten times slower at 72 ranks.

        Raises:
            WorkerLost: a rank failed or did not come within the collective timeout. The group is
                closed; form the next one.
        """
        control = self._control
        mine = torch.tensor(row, dtype=torch.int64)
        rows = mine.new_empty(self.world_size, len(row))
        gather, broadcast = dist.GatherOptions(), dist.BroadcastOptions()
        gather.rootRank = broadcast.rootRank = 0
        try:
            with losing(f"exchange of step rows in epoch {self.epoch}"):
                outputs = [list(rows.unbind(0))] if self.rank == 0 else []
                self._watched(control.gather(outputs, [mine], gather)).wait()
                self._watched(control.broadcast([rows], broadcast)).wait()
        except WorkerLost:
            self.close()
            raise
        return [tuple(line) for line in rows.tolist()]

    def begin_gather(self, line: Sequence[int], *, root: int) -> PendingLines:
        """Send ``line``, of the same width on all ranks, to rank ``root``, which hears all of them
        by rank. Returns at once; all ranks call it in the same order as whatever they exchange.

        Raises:
            WorkerLost: the ranks are not connected.
        """
        mine = torch.tensor(line, dtype=torch.int64)
        lines = mine.new_empty(self.world_size if self.rank == root else 0, len(line))
        options = dist.GatherOptions()
        options.rootRank = root
        outputs = [list(lines.unbind(0))] if self.rank == root else []
        with losing("exchange of what ranks plan"):
            work = self._control.gather(outputs, [mine], options)
        return PendingLines(lines=lines, work=self._watched(work))

    def begin_broadcast(self, line: Sequence[int], *, root: int) -> PendingLines:
        """All ranks hear the ``line`` of rank ``root``; others give one of the same width. As
        ``begin_gather``.
        """
        lines = torch.tensor([line], dtype=torch.int64)
        options = dist.BroadcastOptions()
        options.rootRank = root
        with losing("exchange of what ranks plan"):
            work = self._control.broadcast([lines], options)
        return PendingLines(lines=lines, work=self._watched(work))

    def _watched(self, work: Awaited) -> Awaited:
        return _Watched(work=work, group=self.expert_group)

    @property
    def _control(self) -> Backend:
        if self._connection is None:
            raise WorkerLost("the ranks of this worker are not connected", stage="decode")
        return self._connection.control

    def close(self) -> None:
        """Disconnect. Peers that wait for this rank fail at once instead of at their timeout.

        Call it after any ``WorkerLost``, also one from an expert layer. Calling it twice is fine.
        """
        if self._connection is not None:
            self.expert_group.disconnect()
            self._connection.experts.abort()
            if self._connection.control is not self._connection.experts:
                self._connection.control.abort()
            self._connection = None
        if self._inner is not None:
            self._inner.close()


@contextmanager
def losing(what: str) -> Generator[None]:
    """Failed collectives raise plain ``RuntimeError``; here they mean that a rank is gone."""
    try:
        yield
    except RuntimeError as error:
        # gloo begins with a source line of its own and ends with advice.
        reason = str(error).splitlines()[0].split("] ", 1)[-1].split(". This is", 1)[0]
        raise WorkerLost(f"a rank was lost during the {what}: {reason}", stage="decode") from error
