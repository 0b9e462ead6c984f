"""A layer's exchange in fixed sizes as a CUDA graph, over NCCL with one rank."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from engine.collectives import ExpertGroup
from engine.experts.buffers import ExchangeShape
from engine.experts.fixed_size import FixedSize, FixedSizeTransport
from engine.experts.grouped_gemm import ExpertWeights
from engine.experts.layer import ExpertLayer
from engine.experts.meter import ExchangeMeter
from engine.experts.placement import ExpertPlacement, place_evenly
from engine.experts.transports import RowExchange
from engine.experts.workspaces import Workspaces

EXPERTS, SLOTS, CHOSEN, WIDTH, INNER, MOST = 16, 20, 4, 256, 128, 32
pytestmark = pytest.mark.gpu
TOLERANCE = 2e-2  # bf16, and another order of sums where replicas are others


def group_of_one() -> ExpertGroup:
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timedelta(seconds=60)
    group = ExpertGroup(seat=0, num_seats=1, device=torch.device("cuda"))
    group.connect((0,), nccl(HashStore(), 0, 1, options))
    return group


def layer_on(group: ExpertGroup, name: FixedSize, placement: ExpertPlacement) -> ExpertLayer:
    shape = ExchangeShape(
        num_ranks=1,
        slots_per_rank=SLOTS,
        experts_per_token=CHOSEN,
        hidden=WIDTH,
        element_bytes=2,
        max_tokens_per_rank=MOST,
        numerics="fast",
        on_gpu=True,
    )
    workspaces = Workspaces(name, shape, in_flight=2, device=group.device)
    exchange = RowExchange(
        name=name,
        transport=FixedSizeTransport(name, group, shape, workspaces),
        payload="native",
        meter=ExchangeMeter(group.device),
    )
    held = list(placement.slots_of(0))
    weights = ExpertWeights(gate_up=gate_up()[held], down=down()[held])
    return ExpertLayer(weights, placement, group, "fast", exchange=exchange, movable=True)


def gate_up() -> Tensor:
    return values(EXPERTS, 2 * INNER, WIDTH) * 0.1


def down() -> Tensor:
    return values(EXPERTS, WIDTH, INNER) * 0.1


def values(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to("cuda", torch.bfloat16)


def ids_of(seed: int) -> Tensor:
    """Some are not routed, and how many differs from step to step."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(MOST, EXPERTS, generator=generator).topk(CHOSEN).indices
    ids[torch.rand(MOST, CHOSEN, generator=generator) < 0.1 * seed] = -1
    return ids.cuda()


def reference(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    y_TD = torch.zeros(MOST, WIDTH, device="cuda")
    wide, narrow = gate_up().float(), down().float()
    for token in range(MOST):
        for expert, weight in zip(ids_TK[token].tolist(), weights_TK[token], strict=True):
            if expert >= 0:
                gate, up = (wide[expert] @ x_TD[token].float()).chunk(2)
                y_TD[token] += weight * (narrow[expert] @ (gate * torch.sigmoid(gate) * up))
    return y_TD


def placements() -> tuple[ExpertPlacement, ExpertPlacement]:
    """Two that differ in every slot; what is over is empty, for a rank holds no expert twice."""
    even = place_evenly(EXPERTS, 1).slots_of(0)
    empty = (-1,) * (SLOTS - EXPERTS)
    return ExpertPlacement(EXPERTS, ((*even, *empty),)), ExpertPlacement(
        EXPERTS, ((*empty, *reversed(even)),)
    )


@pytest.mark.parametrize("name", ["padded", "all_gather"])
def test_a_captured_layer_serves_other_counts_and_another_placement(name: FixedSize) -> None:
    group = group_of_one()
    group.begin_step((MOST,))
    first, second = placements()
    layer = layer_on(group, name, first)
    x_TD, weights_TK = values(MOST, WIDTH), values(MOST, CHOSEN).float().abs()
    ids_TK, keys_T = ids_of(0).clone(), torch.arange(MOST, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(x_TD, ids_TK, weights_TK, keys_T)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TD = layer(x_TD, ids_TK, weights_TK, keys_T)

    for seed in range(6):
        if seed == 3:  # experts move between two steps
            held = list(second.slots_of(0))
            layer.weights.gate_up.copy_(gate_up()[held])
            layer.weights.down.copy_(down()[held])
            layer.place(second)
        ids_TK.copy_(ids_of(seed))
        graph.replay()
        torch.cuda.synchronize()
        wanted = reference(x_TD, ids_TK, weights_TK)
        assert (y_TD.float() - wanted).norm() <= TOLERANCE * wanted.norm()
