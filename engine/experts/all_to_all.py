"""Expert rows over ``all_to_all``, whatever carries it.

Small exchanges pad every (source, destination) pair to the source's tokens, whose number all ranks
know, so one collective carries everything. Larger ones exchange counts first. Which, is a pure
function of what all ranks know, so they agree.

Shape suffixes: T tokens of this rank   K chosen experts   N ranks   B rows that arrived
R rows in an exchange   W width of a row
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from engine.experts.rows import columns_of, pack, row_bytes, unpack
from engine.experts.transport import Arrived, Dispatch, Returned

_PADDED_BYTES = 256 * 1024
_MOST_PADDING = 1.6


class RowsOnTheWay(Protocol):
    def wait(self) -> Tensor: ...


class RowGroup(Protocol):
    """What is needed of ``engine.collectives.ExpertGroup``, which says what each part means."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def tokens_of_rank(self) -> tuple[int, ...]: ...

    def exchange_rows(
        self,
        rows_RW: Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        into_RW: Tensor | None = None,
    ) -> RowsOnTheWay: ...


class AllToAllTransport:
    def __init__(self, group: RowGroup, *, slots_per_rank: int) -> None:
        self._group = group
        self._slots_per_rank = slots_per_rank

    def connect(self) -> None:
        """The group's own connections serve."""

    def send(self, payloads: Sequence[Tensor], slot_TK: Tensor) -> Dispatch:
        return _AllToAllDispatch(self._group, self._slots_per_rank, payloads, slot_TK)


def sends_padded(tokens_of_rank: Sequence[int], *, num_chosen: int, row_bytes: int) -> bool:
    """Whether padding costs less than a collective that exchanges counts.

    It does when the rows are few, and when nearly every token goes to nearly every rank anyway.
    """
    num_ranks = len(tokens_of_rank)
    reached = 1 - (1 - 1 / num_ranks) ** num_chosen  # share of ranks that a token goes to
    few = max(tokens_of_rank) * num_ranks * row_bytes <= _PADDED_BYTES
    return few or reached * _MOST_PADDING >= 1


class _AllToAllDispatch:
    """The slot ids travel with the payloads; the receiver finds its own among them."""

    def __init__(
        self,
        group: RowGroup,
        slots_per_rank: int,
        payloads: Sequence[Tensor],
        slot_TK: Tensor,
    ) -> None:
        assert group.tokens_of_rank[group.rank] == len(slot_TK), "begin_step announced otherwise"
        self._group = group
        self._first_slot = group.rank * slots_per_rank
        self._end_slot = self._first_slot + slots_per_rank
        packed = (*payloads, slot_TK.to(torch.int32))
        self._columns = columns_of(packed)
        num_ranks = group.world_size
        self.sent_bytes = 0
        self._rank_TK = torch.where(slot_TK < 0, num_ranks, slot_TK // slots_per_rank)
        self._goes_TN: Tensor | None = None  # None: every token goes to every rank
        if sends_padded(
            group.tokens_of_rank,
            num_chosen=slot_TK.shape[1],
            row_bytes=row_bytes(self._columns),
        ):
            self._sent = [len(slot_TK)] * num_ranks
            self._received = list(group.tokens_of_rank)
            rows_RW = pack(packed, self._columns, copies=num_ranks)
        else:
            self._goes_TN = destinations(self._rank_TK, num_ranks)
            counts_N = self._goes_TN.sum(dim=0)
            ones = [1] * num_ranks
            counts = self._exchange(counts_N.unsqueeze(1), ones, ones)
            self._sent = counts_N.tolist()  # host sync
            self._received = counts.wait().flatten().tolist()  # host sync
            token_R = self._goes_TN.t().nonzero()[:, 1]
            rows_RW = pack(packed, self._columns, copies=1).index_select(0, token_R)
        self._on_the_way = self._exchange(rows_RW, self._sent, self._received)
        self._present_BK: Tensor | None = None
        self._place_TJ = self._rank_TK
        self._present_TJ: Tensor | None = None
        self._dtype = torch.uint8

    def receive(self) -> Arrived:
        *payloads, slot_BK = unpack(self._on_the_way.wait(), self._columns)
        present_BK = (slot_BK >= self._first_slot) & (slot_BK < self._end_slot)
        self._present_BK = present_BK
        return Arrived(
            payloads=tuple(payloads),
            slot_BK=torch.where(present_BK, slot_BK.long() - self._first_slot, -1),
            present_BK=present_BK,
        )

    def return_each(self, rows_RW: Tensor, place_BK: Tensor) -> None:
        assert self._present_BK is not None
        back = _sums_of_runs(self._present_BK.sum(dim=1), self._received)  # host sync
        num_ranks = self._group.world_size
        rank_R = self._rank_TK.flatten()
        *home, unrouted = torch.bincount(rank_R, minlength=num_ranks + 1).tolist()  # host sync
        self._place_TJ = positions_by_rank(self._rank_TK)
        self._present_TJ = self._rank_TK < num_ranks if unrouted else None
        self._return(rows_RW.index_select(0, place_BK[self._present_BK]), back, home)

    def return_sums(self, rows_BW: Tensor) -> None:
        self._place_TJ = positions_of_sums(self._goes_TN, self._sent, rows_BW.device)
        self._present_TJ = self._goes_TN
        self._return(rows_BW, self._received, self._sent)

    def _return(self, rows_RW: Tensor, back: Sequence[int], home: Sequence[int]) -> None:
        self._dtype = rows_RW.dtype
        rows_bytes = rows_RW.view(torch.uint8)
        self._on_the_way = self._exchange(rows_bytes, back, home)

    def _exchange(
        self, rows_RW: Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> RowsOnTheWay:
        rows = sum(sent) - sent[self._group.rank]
        self.sent_bytes += rows * rows_RW.shape[1] * rows_RW.element_size()
        return self._group.exchange_rows(rows_RW, sent, received)

    def collect(self) -> Returned:
        return Returned(
            rows_RW=self._on_the_way.wait().view(self._dtype),
            place_TJ=self._place_TJ,
            present_TJ=self._present_TJ,
        )


def destinations(rank_TK: Tensor, num_ranks: int) -> Tensor:
    """(T, N) bool: whether token t goes to rank n. Rank ``num_ranks`` in ``rank_TK`` is nowhere."""
    goes = torch.zeros(len(rank_TK), num_ranks + 1, dtype=torch.bool, device=rank_TK.device)
    return goes.scatter_(1, rank_TK, value=True)[:, :num_ranks]


def positions_by_rank(rank_TK: Tensor) -> Tensor:
    """Where (t, k) is in the list of all pairs ordered by rank, then t, then k."""
    order_R = torch.argsort(rank_TK.flatten(), stable=True)
    place_R = torch.empty_like(order_R)
    place_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    return place_R.view_as(rank_TK)


def positions_of_sums(goes_TN: Tensor | None, sent: Sequence[int], device: torch.device) -> Tensor:
    """Where token t's row from rank n is, in rank-major order; (T, N).

    ``goes_TN`` None means that all of this rank's tokens went to every rank.
    """
    starts_N = torch.tensor(list(accumulate(sent, initial=0))[:-1], device=device)
    if goes_TN is None:
        return starts_N + torch.arange(sent[0], device=device).unsqueeze(1)
    return starts_N + goes_TN.cumsum(dim=0) - goes_TN.long()


def _sums_of_runs(counts_B: Tensor, runs: Sequence[int]) -> list[int]:
    """Sums over consecutive runs of the given lengths."""
    totals = [0, *counts_B.cumsum(dim=0).tolist()]
    ends = list(accumulate(runs, initial=0))
    return [totals[end] - totals[start] for start, end in pairwise(ends)]
