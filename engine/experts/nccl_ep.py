"""Expert rows over NCCL EP's low-latency mode, whose rank-major layout is the canonical one.

A token travels once to each of its ranks, with its weights and the local slots of its experts;
each rank returns one row, and NCCL EP adds the rows up at the token's rank, so numerics are fast.
``nccl.ep`` is imported only where it was chosen. Its rules are in ``engine.experts.exchange``.

Shape suffixes: T tokens of this rank   K chosen experts   N ranks   M tokens that a rank may bring
B arrived rows, N * M   D model width
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.collectives import ExpertGroup
from engine.experts.buffers import ExchangeShape
from engine.experts.library_seat import LibrarySeat
from engine.experts.transport import Arrived, Dispatch, Returned


class RankMajorExchange(Protocol):
    """One exchange at a time, of fixed size; each half returns at once."""

    def send(self, x_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> None: ...

    def receive(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values (N, M, D), local slots (N, M, K), weights (N, M, K), and how many tokens came
        from each rank (N,): rows beyond them mean nothing.
        """
        ...

    def send_back(self, y_NMD: Tensor) -> None: ...

    def collect(self, num_tokens: int) -> Tensor:
        """(T, D): what came back, added up."""
        ...


class NcclEpGroup(Protocol):
    @property
    def world_size(self) -> int: ...


class NcclEpTransport:
    def __init__(
        self,
        group: NcclEpGroup,
        shape: ExchangeShape,
        connect: Callable[[], Sequence[RankMajorExchange]],
    ) -> None:
        """``connect`` makes one life's exchanges, as many as may be under way at once; all ranks
        call it together.
        """
        self.shape = shape
        self._group = group
        self._connect = connect
        self._free: list[RankMajorExchange] = []

    def connect(self) -> None:
        """A communicator and its buffers are made here, and not within a step."""
        self._free = list(self._connect())
        self.shape = replace(self.shape, num_ranks=self._group.world_size)

    def send(self, payloads: Sequence[Tensor], slot_TK: Tensor) -> Dispatch:
        assert self._free, "too many exchanges are under way, or the ranks have not met"
        x_TD, weights_TK = payloads
        return _NcclEpDispatch(self, self._free.pop(0), x_TD, weights_TK, slot_TK)

    def give_back(self, exchange: RankMajorExchange) -> None:
        self._free.append(exchange)


class _NcclEpDispatch:
    def __init__(
        self,
        transport: NcclEpTransport,
        exchange: RankMajorExchange,
        x_TD: Tensor,
        weights_TK: Tensor,
        slot_TK: Tensor,
    ) -> None:
        self._transport = transport
        self._exchange = exchange
        self._num_tokens = len(x_TD)
        if not self._num_tokens:  # a rank without tokens sends one that goes nowhere
            x_TD = x_TD.new_zeros(1, x_TD.shape[1])
            weights_TK = weights_TK.new_zeros(1, weights_TK.shape[1])
            slot_TK = slot_TK.new_full((1, slot_TK.shape[1]), -1)
        # A row for every choice, though ranks may coincide: to know, one must wait.
        shape = transport.shape
        self._rows = self._num_tokens * min(shape.experts_per_token, shape.num_ranks - 1)
        self.sent_bytes = self._rows * shape.dispatch_row_bytes
        exchange.send(x_TD, slot_TK, weights_TK)

    def receive(self) -> Arrived:
        x_NMD, slot_NMK, weights_NMK, count_N = self._exchange.receive()
        row_M = torch.arange(x_NMD.shape[1], device=x_NMD.device)
        valid_NM1 = (row_M < count_N.unsqueeze(1)).unsqueeze(2)
        slot_BK = torch.where(valid_NM1, slot_NMK.long(), -1).flatten(0, 1)
        return Arrived(
            payloads=(x_NMD.flatten(0, 1), weights_NMK.flatten(0, 1)),
            slot_BK=slot_BK,
            present_BK=slot_BK >= 0,
        )

    def return_each(self, rows_RW: Tensor, place_BK: Tensor) -> None:
        raise AssertionError("NCCL EP sums on the way; exact numerics were refused at the start")

    def return_sums(self, rows_BW: Tensor) -> None:
        shape = self._transport.shape
        self.sent_bytes += self._rows * shape.result_row_bytes
        self._exchange.send_back(rows_BW.view(shape.num_ranks, -1, rows_BW.shape[1]))

    def collect(self) -> Returned:
        y_TD = self._exchange.collect(max(self._num_tokens, 1))
        self._transport.give_back(self._exchange)
        place_T = torch.arange(self._num_tokens, device=y_TD.device)
        return Returned(rows_RW=y_TD, place_TJ=place_T.unsqueeze(1), present_TJ=None)


def nccl_ep_transport(group: ExpertGroup, shape: ExchangeShape) -> NcclEpTransport:
    """
    Raises:
        ImportError: the library cannot be imported; ``exchange.choose`` has said so before.
    """
    core: Any = importlib.import_module("nccl.core")
    library: Any = importlib.import_module("nccl.ep")

    def connect() -> Sequence[RankMajorExchange]:
        present = replace(shape, num_ranks=group.world_size)
        own = core.get_unique_id(empty=group.rank != 0).as_bytes
        told = LibrarySeat(group).allgather(bytes(own))
        identity = core.UniqueId.from_bytes(told[0])
        communicator = core.Communicator.init(group.world_size, group.rank, identity)
        config = library.GroupConfig(
            algorithm=library.Algorithm.LOW_LATENCY,
            num_experts=present.num_slots,
            max_dispatch_tokens_per_rank=shape.max_tokens_per_rank,
            max_token_bytes=2 * shape.hidden,
            num_topk=shape.experts_per_token,
        )
        ranks = library.Group.create(communicator, config)
        return [_NcclEpExchange(library, ranks, present, group.device) for _ in range(2)]

    return NcclEpTransport(group, shape, connect)


class _NcclEpExchange:
    """Tensors keep their addresses; only the number of this rank's tokens changes."""

    def __init__(
        self, library: Any, ranks: Any, shape: ExchangeShape, device: torch.device
    ) -> None:
        self._library = library
        self._ranks = ranks
        self._handle: Any = None
        size, most = shape.num_ranks, shape.max_tokens_per_rank or 0
        chosen, width = shape.experts_per_token, shape.hidden
        self._x_NMD = torch.zeros(size, most, width, dtype=torch.bfloat16, device=device)
        self._slot_NMK = torch.zeros(size, most, chosen, dtype=torch.int64, device=device)
        self._weights_NMK = torch.zeros(size, most, chosen, device=device)
        self._count_N = torch.zeros(size, dtype=torch.int32, device=device)
        self._y_TD = torch.zeros(most, width, dtype=torch.bfloat16, device=device)
        self._y_NMD = torch.zeros_like(self._x_NMD)
        self._held: tuple[Any, ...] = ()  # descriptors that the library reads until it completes

    def send(self, x_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> None:
        ep, stream = self._library, torch.cuda.current_stream()
        chosen = ep.Tensor(slot_TK)
        if self._handle is None:
            layout = ep.Layout.RANK_MAJOR
            self._handle = self._ranks.create_handle(layout, chosen, stream=stream)
        else:
            self._handle.update(chosen, stream=stream)
        inputs = ep.DispatchInputs(tokens=ep.Tensor(x_TD), topk_weights=ep.Tensor(weights_TK))
        outputs = ep.DispatchOutputs(
            tokens=ep.Tensor(self._x_NMD),
            topk_weights=ep.Tensor(self._weights_NMK),
            topk_idx=ep.Tensor(self._slot_NMK),
        )
        counts = ep.LayoutInfo(
            src_rank_counters=ep.Tensor(self._count_N), recv_topk_idx_kind=ep.ExpertIdKind.LOCAL
        )
        config = ep.DispatchConfig(send_only=1)
        self._held = (chosen, inputs, outputs, counts, config)
        self._handle.dispatch(inputs, outputs, layout_info=counts, config=config, stream=stream)

    def receive(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self._handle.complete(stream=torch.cuda.current_stream())
        return self._x_NMD, self._slot_NMK, self._weights_NMK, self._count_N

    def send_back(self, y_NMD: Tensor) -> None:
        ep = self._library
        self._y_NMD.copy_(y_NMD)
        inputs = ep.CombineInputs(tokens=ep.Tensor(self._y_NMD))
        num_tokens = self._held[0].sizes[0]
        outputs = ep.CombineOutputs(tokens=ep.Tensor(self._y_TD[:num_tokens]))
        config = ep.CombineConfig(send_only=1)
        self._held = (*self._held, inputs, outputs, config)
        stream = torch.cuda.current_stream()
        self._handle.combine(inputs, outputs, config=config, stream=stream)

    def collect(self, num_tokens: int) -> Tensor:
        self._handle.complete(stream=torch.cuda.current_stream())
        return self._y_TD[:num_tokens]
