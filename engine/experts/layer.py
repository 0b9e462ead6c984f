"""A layer of experts: dispatch tokens to the ranks that hold them, compute, combine.

With ``exact`` numerics a token's result is the same bit for bit on any number of ranks and with
any batch-mates: every (token, expert) result returns to the token's rank, which sums them in fp32
in the order of the token's choice. ``fast`` returns one sum per destination rank. Which experts a
token chose, and why, is the router's business.

Shape suffixes: T tokens of this rank   K chosen experts   B tokens that arrived   D model width
R rows   J rows that add up to a token
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from engine.collectives import ExpertGroup
from engine.experts.buffers import Payload
from engine.experts.grouped_gemm import ExpertWeights, GroupedExperts
from engine.experts.meter import Lap
from engine.experts.payload import decode, encode
from engine.experts.placement import ExpertPlacement
from engine.experts.replicas import ReplicaTable
from engine.experts.transport import Arrived, Dispatch
from engine.experts.transports import RowExchange, exact_splits

Numerics = Literal["exact", "fast"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingExperts:
    """What ``ExpertLayer.dispatch`` has sent off and ``combine`` brings home."""

    dispatch: Dispatch
    weights_TK: Tensor
    dtype: torch.dtype
    lap: Lap


class ExpertLayer:
    """The routed experts of one MoE layer, SwiGLU inside.

    Every rank calls every layer in every step, with zero tokens if it has none. Between
    ``dispatch`` and ``combine`` the caller may compute what needs no routing (a shared expert).
    """

    def __init__(
        self,
        weights: ExpertWeights,
        placement: ExpertPlacement,
        group: ExpertGroup,
        numerics: Numerics,
        *,
        exchange: RowExchange | None = None,
        layer: int = 0,
        movable: bool = False,
    ) -> None:
        """``weights`` are those of this rank's slots, in the order of ``placement.slots_of``.

        ``exchange`` is shared by a model's layers; None makes one with exact splits. ``movable``:
        experts may change their slots while the layer is in use.
        """
        assert placement.num_ranks == group.num_seats
        assert placement.slots_per_rank == weights.num_slots
        self._group = group
        self._experts = GroupedExperts(weights, exact=numerics == "exact")
        self._numerics = numerics
        self._replicas = ReplicaTable(placement, layer=layer, device=group.device, movable=movable)
        if exchange is None:
            exchange = exact_splits(group, slots_per_rank=placement.slots_per_rank)
        self._transport = exchange.transport
        self._payload: Payload = exchange.payload
        self._meter = exchange.meter

    @property
    def weights(self) -> ExpertWeights:
        """Of this rank's slots; written in place when experts move."""
        return self._experts.weights

    def place(self, placement: ExpertPlacement) -> None:
        """From now on tokens go where ``placement`` says, which is to the group's members as they
        are now. On all ranks between the same steps.
        """
        self._replicas.load(placement, self._group.members)

    def __call__(
        self,
        x_TD: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        token_keys_T: Tensor | None = None,
    ) -> Tensor:
        """Weighted sum over each token's chosen experts, (T, D) in the dtype of ``x_TD``.

        An id of -1 is not routed and adds nothing; a token may not choose an expert twice.
        ``token_keys_T`` choose among replicas and are needed where there are any.

        Raises:
            WorkerLost: another rank failed; the step is lost on every rank.
        """
        return self.combine(self.dispatch(x_TD, topk_ids_TK, topk_weights_TK, token_keys_T))

    def dispatch(
        self,
        x_TD: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        token_keys_T: Tensor | None = None,
    ) -> PendingExperts:
        """Send the tokens off and return at once."""
        lap = self._meter.begin()
        slot_TK = self._replicas(topk_ids_TK, token_keys_T)
        weights_TK = topk_weights_TK.float()
        payloads = encode(x_TD, self._payload)
        if self._numerics == "fast":
            payloads = (*payloads, weights_TK)
        dispatch = self._transport.send(payloads, slot_TK)
        lap.end("dispatch")
        self._meter.add_bytes("dispatch", dispatch.sent_bytes)
        return PendingExperts(dispatch=dispatch, weights_TK=weights_TK, dtype=x_TD.dtype, lap=lap)

    def combine(self, pending: PendingExperts) -> Tensor:
        """Compute what has arrived here, and wait for this rank's own tokens."""
        self.compute(pending)
        return self.collect(pending)

    def compute(self, pending: PendingExperts) -> None:
        """The first half of ``combine``: results are on their way home when it returns."""
        dispatch, lap = pending.dispatch, pending.lap
        lap.resume()
        arrived = dispatch.receive()
        lap.end("dispatch")
        sent_bytes = dispatch.sent_bytes
        back = torch.bfloat16 if self._payload == "bf16" else pending.dtype
        if self._numerics == "exact":
            x_BD = decode(arrived.payloads, pending.dtype)
            results = self._experts(x_BD, arrived.slot_BK)
            lap.end("compute")
            dispatch.return_each(results.y_PD.to(back), results.place_BK)
        else:
            y_BD = self._sums(arrived, pending.dtype)
            lap.end("compute")
            dispatch.return_sums(y_BD.to(back))
        lap.end("combine")
        self._meter.add_bytes("combine", dispatch.sent_bytes - sent_bytes)

    def _sums(self, arrived: Arrived, dtype: torch.dtype) -> Tensor:
        """(B, D): of each arrived row the weighted sum of its experts here."""
        *travelled, weights_BK = arrived.payloads
        x_BD, slot_BK, present_BK = decode(travelled, dtype), arrived.slot_BK, arrived.present_BK
        if x_BD.is_cuda:
            slot_BK, weights_BK = only_here(slot_BK, weights_BK, self.weights.num_slots)
            present_BK = slot_BK >= 0
        results = self._experts(x_BD, slot_BK)
        return _sum_rows(
            results.y_PD,
            results.place_BK,
            present_BK,
            weights_BK,
            by_zero=x_BD.is_cuda,  # what is not here has a row of zeros of its own there
        )

    def collect(self, pending: PendingExperts) -> Tensor:
        """The second half of ``combine``."""
        pending.lap.resume()
        home = pending.dispatch.collect()
        weights_TK = pending.weights_TK if self._numerics == "exact" else None
        y_TD = _sum_rows(
            home.rows_RW, home.place_TJ, home.present_TJ, weights_TK, by_zero=home.absent_is_own
        )
        pending.lap.end("combine")
        return y_TD.to(pending.dtype)


def only_here(slot_BK: Tensor, weights_BK: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Fewer columns, where a row chose more experts than there are slots here: those that are here
    come first, in their order. A device computes a row for each column, present or not.
    """
    if slot_BK.shape[1] <= num_slots:
        return slot_BK, weights_BK
    order_BJ = torch.argsort((slot_BK < 0).to(torch.int8), dim=1, stable=True)[:, :num_slots]
    return slot_BK.gather(1, order_BJ), weights_BK.gather(1, order_BJ)


def _sum_rows(
    rows_RD: Tensor,
    place_TJ: Tensor,
    present_TJ: Tensor | None,
    weights_TJ: Tensor | None,
    *,
    by_zero: bool,
) -> Tensor:
    """Sum each token's rows in fp32, left to right, with fp32 weights; round once at the end.

    ``by_zero``: what is absent is multiplied by zero, which needs no host, instead of left out.
    """
    if present_TJ is not None and by_zero:
        if weights_TJ is None:
            weights_TJ = present_TJ.to(rows_RD.dtype)
        else:
            weights_TJ = weights_TJ.masked_fill(~present_TJ, 0)
        present_TJ = None
    if weights_TJ is not None and weights_TJ.dtype != rows_RD.dtype:
        # The kernel takes weights of the rows' own dtype only, so each goes in as the sum of two.
        coarse_TJ = weights_TJ.to(rows_RD.dtype)
        rest_TJ = (weights_TJ - coarse_TJ).to(rows_RD.dtype)
        weights_TJ = torch.cat((coarse_TJ, rest_TJ), dim=1)
        place_TJ = torch.cat((place_TJ, place_TJ), dim=1)
        present_TJ = None if present_TJ is None else torch.cat((present_TJ, present_TJ), dim=1)
    if present_TJ is None:
        return functional.embedding_bag(
            place_TJ, rows_RD, mode="sum", per_sample_weights=weights_TJ
        )
    counts_T = present_TJ.sum(dim=1)
    return functional.embedding_bag(
        place_TJ[present_TJ],  # host sync
        rows_RD,
        offsets=counts_T.cumsum(dim=0) - counts_T,
        mode="sum",
        per_sample_weights=None if weights_TJ is None else weights_TJ[present_TJ],
    )
