"""The adapters to DeepEP and NCCL EP, with the libraries' documented layouts made over gloo.

The libraries themselves need GPUs. What is tested is that the adapters read and write the layouts
as their documentation describes them: blocks of experts with their rows in front, and blocks of
source ranks with local slots.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.collectives import ExpertGroup, StepGroup
from engine.experts.buffers import ExchangeShape
from engine.experts.deepep import DeepEpTransport
from engine.experts.grouped_gemm import ExpertWeights
from engine.experts.layer import ExpertLayer
from engine.experts.library_seat import LibrarySeat
from engine.experts.meter import ExchangeMeter
from engine.experts.nccl_ep import NcclEpTransport
from engine.experts.payload import encode
from engine.experts.placement import place_evenly
from engine.experts.transport import ExpertTransport
from engine.experts.transports import RowExchange
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
RANKS, EXPERTS, CHOSEN, WIDTH, MOST = 3, 6, 3, 128, 9
TOKENS = (4, 0, 9)
PADDING = 1e30  # what no result may depend on
pytestmark = pytest.mark.multirank


def shape_of(payload: str) -> ExchangeShape:
    return ExchangeShape(
        num_ranks=RANKS,
        slots_per_rank=EXPERTS // RANKS,
        experts_per_token=CHOSEN,
        hidden=WIDTH,
        element_bytes=4,
        max_tokens_per_rank=MOST,
        numerics="fast",
        payload=payload,  # type: ignore[arg-type]
    )


def to_all(group: ExpertGroup, part: Tensor) -> list[Tensor]:
    """Everybody's ``part``; all are of one shape."""
    rows = part.reshape(1, -1).repeat(RANKS, 1)
    ones = [1] * RANKS
    return [row.view(part.shape) for row in group.exchange_rows(rows, ones, ones).wait()]


def padded(part: Tensor, fill: float) -> Tensor:
    whole = part.new_full((MOST, part.shape[1]), fill)
    whole[: len(part)] = part
    return whole


@dataclass
class ExpertMajor:
    """``deep_ep.Buffer``'s low-latency calls."""

    group: ExpertGroup

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        *,
        use_fp8: bool,
        return_recv_hook: bool,
    ) -> Any:
        assert (num_max_dispatch_tokens_per_rank, num_experts) == (MOST, EXPERTS)
        assert return_recv_hook
        assert len(x) > 0
        tokens = to_all(self.group, padded(x, 0))
        chosen = to_all(self.group, padded(topk_idx, -1))
        slots = num_experts // RANKS
        received = x.new_full((slots, RANKS * MOST, WIDTH), PADDING)
        counts = torch.zeros(slots, dtype=torch.int32)
        sources = []
        for slot in range(slots):
            expert = self.group.rank * slots + slot
            found = [
                (rank, token)
                for rank in range(RANKS)
                for token in range(MOST)
                if expert in chosen[rank][token].tolist()
            ]
            for row, (rank, token) in enumerate(found):
                received[slot, row] = tokens[rank][token]
            counts[slot] = len(found)
            sources.append(found)
        parts: Any = received
        if use_fp8:
            values, scales = encode(received.flatten(0, 1), "fp8")
            parts = values.view(slots, -1, WIDTH), scales.view(slots, -1, 1)
        return parts, counts, sources, None, lambda: None

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Any,
        *,
        return_recv_hook: bool,
    ) -> tuple[Tensor, Any, Callable[[], None]]:
        assert return_recv_hook
        results = torch.zeros(RANKS, MOST, EXPERTS, WIDTH)
        for slot, found in enumerate(handle):
            for row, (rank, token) in enumerate(found):
                results[rank, token, self.group.rank * len(handle) + slot] = x[slot, row]
        ones = [1] * RANKS
        home = self.group.exchange_rows(results.flatten(1), ones, ones).wait()
        of_expert = home.view(RANKS, MOST, EXPERTS, WIDTH).sum(dim=0)
        combined = torch.zeros(len(topk_idx), WIDTH)
        for token, (ids, weights) in enumerate(zip(topk_idx, topk_weights, strict=True)):
            for expert, weight in zip(ids.tolist(), weights, strict=True):
                if expert >= 0:
                    combined[token] += weight * of_expert[token, expert]
        return combined, None, lambda: None


class RankMajor:
    """NCCL EP's low-latency mode with the rank-major layout."""

    def __init__(self, group: ExpertGroup) -> None:
        self.group = group
        self.arrived: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self.summed = torch.zeros(0)

    def send(self, x_TD: Tensor, slot_TK: Tensor, weights_TK: Tensor) -> None:
        slots = EXPERTS // RANKS
        tokens = to_all(self.group, padded(x_TD, 0))
        chosen = to_all(self.group, padded(slot_TK, -1))
        weights = to_all(self.group, padded(weights_TK, 0))
        x = x_TD.new_full((RANKS, MOST, WIDTH), PADDING)
        local = torch.full((RANKS, MOST, CHOSEN), 7)
        weight = torch.full((RANKS, MOST, CHOSEN), PADDING)
        counts = torch.zeros(RANKS, dtype=torch.int32)
        self.rows: list[list[int]] = []
        for rank in range(RANKS):
            here = chosen[rank] // slots == self.group.rank
            rows = [token for token in range(MOST) if bool(here[token].any())]
            for row, token in enumerate(rows):
                x[rank, row], weight[rank, row] = tokens[rank][token], weights[rank][token]
                first = self.group.rank * slots
                local[rank, row] = torch.where(here[token], chosen[rank][token] - first, -1)
            counts[rank] = len(rows)
            self.rows.append(rows)
        self.arrived = x, local, weight, counts

    def receive(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert self.arrived is not None
        return self.arrived

    def send_back(self, y_NMD: Tensor) -> None:
        results = torch.zeros(RANKS, MOST, WIDTH)
        for rank, rows in enumerate(self.rows):
            results[rank, rows] = y_NMD[rank, : len(rows)]
        ones = [1] * RANKS
        home = self.group.exchange_rows(results.flatten(1), ones, ones).wait()
        self.summed = home.view(RANKS, MOST, WIDTH).sum(dim=0)

    def collect(self, num_tokens: int) -> Tensor:
        return self.summed[:num_tokens]


def tokens_of(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    count = TOKENS[rank]
    ids = torch.rand(count, EXPERTS, generator=generator).topk(CHOSEN).indices
    ids[torch.rand(count, CHOSEN, generator=generator) < 0.2] = -1
    x = torch.randn(count, WIDTH, generator=generator)
    return x, ids, torch.rand(count, CHOSEN, generator=generator)


def layer_on(group: ExpertGroup, exchange: RowExchange | None) -> ExpertLayer:
    generator = torch.Generator().manual_seed(9)
    gate_up = torch.randn(EXPERTS, 32, WIDTH, generator=generator) * 0.2
    down = torch.randn(EXPERTS, WIDTH, 16, generator=generator) * 0.2
    placement = place_evenly(EXPERTS, group.world_size)
    held = list(placement.slots_of(group.rank))
    weights = ExpertWeights(gate_up=gate_up[held], down=down[held])
    return ExpertLayer(weights, placement, group, "fast", exchange=exchange)


def through(step_group: StepGroup, library: str, payload: str) -> list[Tensor]:
    group, shape = step_group.expert_group, shape_of(payload)
    group.begin_step(TOKENS)
    transport: ExpertTransport
    if library == "deepep":
        transport = DeepEpTransport(group, shape, lambda: ExpertMajor(group))
    else:
        transport = NcclEpTransport(group, shape, lambda: [RankMajor(group), RankMajor(group)])
    transport.connect()
    exchange = RowExchange(
        name=library,  # type: ignore[arg-type]
        transport=transport,
        payload="native",
        meter=ExchangeMeter(CPU),
    )
    layer = layer_on(group, exchange)
    return [layer(*tokens_of(group.rank)) for _ in range(3)]


@pytest.mark.parametrize(
    ("library", "payload", "tolerance"),
    [("deepep", "native", 1e-5), ("deepep", "fp8", 0.06), ("nccl_ep", "native", 1e-5)],
)
def test_a_librarys_layout_gives_what_one_rank_computes(
    library: str, payload: str, tolerance: float
) -> None:
    of_ranks = run_ranks(through, RANKS, library, payload)

    alone = layer_on(ExpertGroup.single(CPU), None)
    for rank, results in enumerate(of_ranks):
        whole = alone(*tokens_of(rank))
        for result in results:
            assert result.shape == whole.shape
            assert (result - whole).norm() <= tolerance * max(whole.norm(), 1)


def tell_all(step_group: StepGroup) -> list[object]:
    group = step_group.expert_group
    group.begin_step((0,) * RANKS)
    seat = LibrarySeat(group)
    told = (group.rank, None if group.rank == 1 else bytes([group.rank] * (3 + group.rank)))
    return [seat.Get_rank(), seat.Get_size(), *(seat.allgather(one) for one in told)]


def test_ranks_tell_one_another_addresses_of_any_length() -> None:
    for rank, found in enumerate(run_ranks(tell_all, RANKS)):
        assert found == [rank, 3, [0, 1, 2], [bytearray(3), None, bytearray([2] * 5)]]
