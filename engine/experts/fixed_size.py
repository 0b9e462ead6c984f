"""Expert rows in exchanges of fixed size, which a CUDA graph can capture.

Every rank gives every rank as many rows as the busiest brings, rounded up so that few sizes occur;
a row without an expert on a rank has nothing but slots of other ranks there and comes to nothing.
Nothing waits for the host, and buffers keep their addresses, so a captured step stays right while
tokens and their experts change. ``padded`` is an all-to-all both ways; ``all_gather`` gathers rows
and, with fast numerics, sums results by a reduce-scatter, which a switch can do on the way.

Shape suffixes: T tokens of this rank   K chosen experts   N ranks   B rows that arrived
J results of an arrived row   R rows in an exchange   W width of a row
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from engine.experts.all_to_all import RowGroup, RowsOnTheWay
from engine.experts.buffers import ExchangeShape
from engine.experts.rows import columns_of, row_bytes, unpack, write
from engine.experts.transport import Arrived, Dispatch, Returned
from engine.experts.workspaces import Workspaces

FixedSize = Literal["padded", "all_gather"]


class FixedSizeGroup(RowGroup, Protocol):
    """What is needed of ``engine.collectives.ExpertGroup``, which says what each part means."""

    @property
    def lives(self) -> int: ...

    def gather_rows(self, rows_BW: Tensor, into_RW: Tensor) -> RowsOnTheWay: ...

    def sum_rows(self, rows_RW: Tensor, into_BW: Tensor) -> RowsOnTheWay: ...


class FixedSizeTransport:
    def __init__(
        self, name: FixedSize, group: FixedSizeGroup, shape: ExchangeShape, workspaces: Workspaces
    ) -> None:
        self.name: FixedSize = name
        self.group = group
        self.shape = shape
        self.workspaces = workspaces

    def connect(self) -> None:
        """The group's own connections serve."""

    def send(self, payloads: Sequence[Tensor], slot_TK: Tensor) -> Dispatch:
        return _FixedSizeDispatch(self, payloads, slot_TK)


def step_tokens(tokens_of_rank: Sequence[int], max_tokens: int) -> int:
    """Rows that each rank gives each rank in a step: at least one, and a power of two or the most
    that there may be, so that a graph serves many steps.
    """
    busiest = max(*tokens_of_rank, 1)
    assert busiest <= max_tokens, f"{busiest} tokens in a step of at most {max_tokens}"
    return min(1 << (busiest - 1).bit_length(), max_tokens)


def order_on_rank(rank_TK: Tensor) -> Tensor:
    """(T, K): how many of a token's earlier choices are on the same rank as this one."""
    same_TKK = rank_TK.unsqueeze(2) == rank_TK.unsqueeze(1)
    return same_TKK.tril(diagonal=-1).sum(dim=2)


def results_in_order(rows_RW: Tensor, place_BK: Tensor, present_BK: Tensor, most: int) -> Tensor:
    """(B * J, W): of each arrived row its results, in the order of its choices, then zeros up to
    ``most`` = J, the most that a row may have.
    """
    absent_BK = present_BK.logical_not()
    order_BJ = torch.argsort(absent_BK.to(torch.int8), dim=1, stable=True)[:, :most]
    absent_R = absent_BK.gather(1, order_BJ).flatten()
    if not rows_RW.shape[0]:
        return rows_RW.new_zeros(absent_R.shape[0], rows_RW.shape[1])
    place_R = place_BK.gather(1, order_BJ).flatten().masked_fill(absent_R, 0)
    return rows_RW.index_select(0, place_R).masked_fill_(absent_R.unsqueeze(1), 0)


class _FixedSizeDispatch:
    def __init__(
        self, transport: FixedSizeTransport, payloads: Sequence[Tensor], slot_TK: Tensor
    ) -> None:
        group, shape = transport.group, transport.shape
        assert shape.max_tokens_per_rank is not None
        assert group.tokens_of_rank[group.rank] == len(slot_TK), "begin_step announced otherwise"
        self._transport = transport
        self._group = group
        self._shape = shape
        self._workspace = transport.workspaces.take(group.lives)
        self._rows = step_tokens(group.tokens_of_rank, shape.max_tokens_per_rank)
        self.sent_bytes = 0
        # What is not routed is looked for on rank 0, where the token has a row, and left out.
        self._routed_TK = slot_TK >= 0
        self._rank_TK = torch.where(self._routed_TK, slot_TK // shape.slots_per_rank, 0)
        self._order_TK = order_on_rank(torch.where(self._routed_TK, self._rank_TK, -1))
        self._columns = columns_of((*payloads, slot_TK.to(torch.int32)))
        row = row_bytes(self._columns)
        assert row <= self._workspace.sent.shape[1], f"rows of {row} bytes do not fit the buffers"
        self._on_the_way = self._send((*payloads, slot_TK.to(torch.int32)))
        self._present_BK: Tensor | None = None
        self._place_TJ = slot_TK
        self._present_TJ: Tensor | None = None

    def _send(self, packed: Sequence[Tensor]) -> RowsOnTheWay:
        gathers = self._transport.name == "all_gather"
        copies, num_tokens = (1 if gathers else self._group.world_size), len(packed[0])
        send_RW = self._workspace.sent[: copies * self._rows]
        send_CTW = send_RW.view(copies, self._rows, -1)
        write(send_CTW[:, :num_tokens], packed, self._columns)
        unpack(send_CTW, self._columns)[-1][:, num_tokens:] = -1
        if not gathers:
            return self._exchange(send_RW, self._workspace.arrived, self._rows)
        self.sent_bytes += (self._group.world_size - 1) * send_RW.nbytes
        arrived_BW = self._workspace.arrived[: self._group.world_size * self._rows]
        return self._group.gather_rows(send_RW, arrived_BW)

    def receive(self) -> Arrived:
        *payloads, slot_BK = unpack(self._on_the_way.wait(), self._columns)
        local_BK = slot_BK.long() - self._group.rank * self._shape.slots_per_rank
        present_BK = (local_BK >= 0) & (local_BK < self._shape.slots_per_rank)
        self._present_BK = present_BK
        return Arrived(
            payloads=tuple(payloads),
            slot_BK=local_BK.masked_fill(~present_BK, -1),
            present_BK=present_BK,
        )

    def return_each(self, rows_RW: Tensor, place_BK: Tensor) -> None:
        assert self._present_BK is not None
        most = min(self._shape.experts_per_token, self._shape.slots_per_rank)
        self._place_TJ = self._place_of_rows() * most + self._order_TK.clamp_max(most - 1)
        self._present_TJ = self._routed_TK
        self._return(results_in_order(rows_RW, place_BK, self._present_BK, most), self._rows * most)

    def return_sums(self, rows_BW: Tensor) -> None:
        if self._transport.name == "all_gather":
            self._sum(rows_BW)
            return
        # A token has one row from each of its ranks, which its first choice there stands for.
        self._place_TJ = self._place_of_rows()
        self._present_TJ = self._routed_TK & (self._order_TK == 0)
        self._return(rows_BW, self._rows)

    def collect(self) -> Returned:
        rows_RW = self._on_the_way.wait()
        self._transport.workspaces.give_back(self._workspace)
        return Returned(
            rows_RW=rows_RW,
            place_TJ=self._place_TJ,
            present_TJ=self._present_TJ,
            absent_is_own=True,
        )

    def _place_of_rows(self) -> Tensor:
        """(T, K): where the token's row from each of its ranks is, in rank-major order."""
        token_T = torch.arange(self._rank_TK.shape[0], device=self._rank_TK.device)
        return self._rank_TK * self._rows + token_T.unsqueeze(1)

    def _return(self, rows_RW: Tensor, rows_to_each: int) -> None:
        returned_RW = self._workspace.returned.view(rows_RW.dtype)[: rows_RW.shape[0]]
        returned_RW.copy_(rows_RW)
        home_RW = self._workspace.home.view(rows_RW.dtype)
        self._on_the_way = self._exchange(returned_RW, home_RW, rows_to_each)

    def _sum(self, rows_BW: Tensor) -> None:
        returned_BW = self._workspace.returned.view(rows_BW.dtype)[: rows_BW.shape[0]]
        returned_BW.copy_(rows_BW)
        self.sent_bytes += returned_BW.nbytes - returned_BW.nbytes // self._group.world_size
        home_RW = self._workspace.home.view(rows_BW.dtype)[: self._rows]
        self._on_the_way = self._group.sum_rows(returned_BW, home_RW)
        num_tokens = self._rank_TK.shape[0]
        self._place_TJ = torch.arange(num_tokens, device=rows_BW.device).unsqueeze(1)
        self._present_TJ = None

    def _exchange(self, rows_RW: Tensor, into_RW: Tensor, rows_to_each: int) -> RowsOnTheWay:
        counts = [rows_to_each] * self._group.world_size
        self.sent_bytes += rows_RW.nbytes - rows_RW.nbytes // self._group.world_size
        return self._group.exchange_rows(rows_RW, counts, counts, into_RW[: rows_RW.shape[0]])
