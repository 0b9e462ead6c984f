"""Expert rows over DeepEP's low-latency kernels, as an adapter to the canonical layout.

DeepEP gives every (token, expert) a row in the block of that expert; here each is an arrived row
with one slot. It sums at the token's rank, with the token's weights, so rows go home unweighted
and numerics are fast. It quantises inside, so rows come to it in bfloat16. ``deep_ep`` is
imported only where it was chosen. Its rules are in ``engine.experts.exchange``.

Shape suffixes: T tokens of this rank   K chosen experts   S expert slots of this rank   N ranks
M tokens that a rank may bring   B arrived rows, S * N * M   D model width
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.collectives import ExpertGroup
from engine.experts.buffers import ExchangeShape, deepep_bytes
from engine.experts.library_seat import LibrarySeat
from engine.experts.payload import decode
from engine.experts.transport import Arrived, Dispatch, Returned

Hook = Callable[[], None]
Handle = Any  # DeepEP's own

_RECEIVED = tuple[Tensor | tuple[Tensor, Tensor], Tensor, Handle, Any, Hook]


class LowLatencyBuffer(Protocol):
    """What is used of ``deep_ep.Buffer``, as its documentation describes it."""

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        *,
        use_fp8: bool,
        return_recv_hook: bool,
    ) -> _RECEIVED: ...

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Handle,
        *,
        return_recv_hook: bool,
    ) -> tuple[Tensor, Any, Hook]: ...


class DeepEpGroup(Protocol):
    @property
    def world_size(self) -> int: ...


class DeepEpTransport:
    def __init__(
        self, group: DeepEpGroup, shape: ExchangeShape, connect: Callable[[], LowLatencyBuffer]
    ) -> None:
        """``connect`` makes the buffer of one life of the group; all ranks call it together."""
        self._shape = shape
        self._group = group
        self._connect = connect
        self._buffer: LowLatencyBuffer | None = None

    def connect(self) -> None:
        """Buffers are made and registered here, and not within a step."""
        self._buffer = self._connect()

    def send(self, payloads: Sequence[Tensor], slot_TK: Tensor) -> Dispatch:
        assert self._buffer is not None, "the ranks have not met"
        x_TD, weights_TK = payloads
        # The ranks that are there now; buffers are large enough for all.
        present = replace(self._shape, num_ranks=self._group.world_size)
        return _DeepEpDispatch(self._buffer, present, x_TD, weights_TK, slot_TK)


def deepep_transport(group: ExpertGroup, shape: ExchangeShape) -> DeepEpTransport:
    """
    Raises:
        ImportError: the library cannot be imported; ``exchange.choose`` has said so before.
    """
    library: Any = importlib.import_module("deep_ep")

    def connect() -> LowLatencyBuffer:
        buffer: LowLatencyBuffer = library.Buffer(
            None,
            num_rdma_bytes=deepep_bytes(shape),
            low_latency_mode=True,
            num_qps_per_rank=shape.slots_per_rank,
            comm=LibrarySeat(group),
        )
        return buffer

    return DeepEpTransport(group, shape, connect)


class _DeepEpDispatch:
    def __init__(
        self,
        buffer: LowLatencyBuffer,
        shape: ExchangeShape,
        x_TD: Tensor,
        weights_TK: Tensor,
        slot_TK: Tensor,
    ) -> None:
        self._buffer = buffer
        self._shape = shape
        self._num_tokens = len(x_TD)
        if not self._num_tokens:  # a rank without tokens sends one that goes nowhere
            x_TD = x_TD.new_zeros(1, x_TD.shape[1])
            weights_TK = weights_TK.new_zeros(1, weights_TK.shape[1])
            slot_TK = slot_TK.new_full((1, slot_TK.shape[1]), -1)
        self._slot_TK = slot_TK
        self._weights_TK = weights_TK
        self._dtype = x_TD.dtype
        self._most = shape.max_tokens_per_rank or 0
        # A message for every choice, though some are unrouted or stay here: to know, one must wait.
        self._messages = self._num_tokens * shape.experts_per_token
        self.sent_bytes = self._messages * shape.dispatch_row_bytes
        self._received, self._count_S, self._handle, _, self._hook = buffer.low_latency_dispatch(
            x_TD,
            slot_TK,
            self._most,
            shape.num_slots,
            use_fp8=shape.payload == "fp8",
            return_recv_hook=True,
        )
        self._combined_TD = x_TD

    def receive(self) -> Arrived:
        self._hook()
        received = self._received
        parts = received if isinstance(received, tuple) else (received,)
        x_BD = decode([part.flatten(0, 1) for part in parts], self._dtype)
        rows = torch.arange(self._shape.num_ranks * self._most, device=x_BD.device)
        slots_S1 = torch.arange(self._shape.slots_per_rank, device=x_BD.device).unsqueeze(1)
        here = rows < self._count_S.unsqueeze(1)  # an expert's rows are at the front of its block
        slot_B1 = torch.where(here, slots_S1, -1).flatten().unsqueeze(1)
        ones_B1 = torch.ones_like(slot_B1, dtype=torch.float32)
        return Arrived(payloads=(x_BD, ones_B1), slot_BK=slot_B1, present_BK=slot_B1 >= 0)

    def return_each(self, rows_RW: Tensor, place_BK: Tensor) -> None:
        raise AssertionError("DeepEP sums on the way; exact numerics were refused at the start")

    def return_sums(self, rows_BW: Tensor) -> None:
        self.sent_bytes += self._messages * self._shape.result_row_bytes
        y_SRD = rows_BW.view(self._shape.slots_per_rank, -1, rows_BW.shape[1])
        self._combined_TD, _, self._hook = self._buffer.low_latency_combine(
            y_SRD, self._slot_TK, self._weights_TK, self._handle, return_recv_hook=True
        )

    def collect(self) -> Returned:
        self._hook()
        place_T = torch.arange(self._num_tokens, device=self._combined_TD.device)
        return Returned(rows_RW=self._combined_TD, place_TJ=place_T.unsqueeze(1), present_TJ=None)
