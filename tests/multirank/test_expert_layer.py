"""Expert parallelism over real processes and gloo: any number of ranks gives the bits of one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from engine.collectives import ExpertGroup, StepGroup
from engine.experts.all_to_all import sends_padded
from engine.experts.balancer import balance
from engine.experts.buffers import ExchangeShape, Payload
from engine.experts.exchange import TransportChoice
from engine.experts.grouped_gemm import ExpertWeights
from engine.experts.layer import ExpertLayer, Numerics
from engine.experts.placement import (
    EMPTY,
    ExpertPlacement,
    Topology,
    place_evenly,
    shares_by,
)
from engine.experts.replicas import request_key, token_keys
from engine.experts.transports import make_exchange
from tests.support.ranks import run_ranks

WIDTH, EXPERT_WIDTH = 48, 40
TRANSPORTS: tuple[TransportChoice, ...] = ("all_to_all", "padded", "all_gather")
pytestmark = pytest.mark.multirank


@dataclass(frozen=True, kw_only=True)
class Case:
    tokens_of_rank: tuple[int, ...]
    num_experts: int
    chosen: int
    routing: str = "spread"
    redundant: int = 0
    load: tuple[int, ...] = ()  # what experts are placed by; none: evenly
    equal_shares: bool = True  # of replicas, where there is no load
    dtype: torch.dtype = torch.float32
    numerics: Numerics = "exact"
    transport: TransportChoice = "auto"
    payload: Payload = "native"
    width: int = WIDTH


CASES = {
    "all experts chosen": Case(tokens_of_rank=(5, 13), num_experts=24, chosen=24),
    "one favourite": Case(tokens_of_rank=(5, 13), num_experts=8, chosen=2, routing="one expert"),
    "an idle rank": Case(tokens_of_rank=(0, 7, 1), num_experts=7, chosen=2),
    "unrouted ids": Case(
        tokens_of_rank=(0, 40, 3, 9), num_experts=30, chosen=4, routing="some unrouted"
    ),
    "replicas": Case(tokens_of_rank=(0, 40, 3, 9), num_experts=30, chosen=4, redundant=6),
    "replicas by load": Case(
        tokens_of_rank=(2, 17, 0, 9),
        num_experts=12,
        chosen=4,
        redundant=8,
        load=(90, 40, 30, 7, 6, 5, 4, 3, 3, 2, 1, 0),
    ),
    "replicas with unequal shares": Case(
        tokens_of_rank=(0, 40, 3, 9),
        num_experts=12,
        chosen=4,
        redundant=16,
        equal_shares=False,
    ),
    "replicas on eight ranks": Case(
        tokens_of_rank=(1, 0, 12, 23, 2, 0, 9, 4),
        num_experts=16,
        chosen=3,
        routing="one expert",
        redundant=8,
        load=(1, 1, 1, 90, *(1,) * 12),
    ),
    "counts exchanged": Case(tokens_of_rank=(1, 0, 400, 23, 2, 0, 9, 4), num_experts=30, chosen=1),
    "more ranks than experts": Case(
        tokens_of_rank=(1, 0, 0, 23, 2, 0, 9, 4), num_experts=5, chosen=2, routing="one expert"
    ),
}


def placement_of(case: Case, num_ranks: int) -> ExpertPlacement:
    placement = place_evenly(case.num_experts, num_ranks, redundant=case.redundant)
    if not case.equal_shares:
        weights = [
            [(3 * rank + 5 * slot) % 7 for slot in range(placement.slots_per_rank)]
            for rank in range(num_ranks)
        ]
        shares = shares_by(placement.slots, weights)
        return ExpertPlacement(case.num_experts, placement.slots, shares)
    if not case.load:
        return placement
    return balance(case.load, Topology(num_ranks), placement.slots_per_rank)


def layer_of(case: Case, group: ExpertGroup) -> ExpertLayer:
    generator = torch.Generator().manual_seed(1)
    gate_up = torch.randn(case.num_experts, 2 * EXPERT_WIDTH, case.width, generator=generator) * 0.2
    down = torch.randn(case.num_experts, case.width, EXPERT_WIDTH, generator=generator) * 0.2
    placement = placement_of(case, group.world_size)
    held = torch.tensor(placement.slots_of(group.rank))
    local = ExpertWeights(
        gate_up=gate_up[held.clamp_min(0)].to(case.dtype),
        down=down[held.clamp_min(0)].to(case.dtype),
    )
    local.gate_up[held == EMPTY] = 0
    local.down[held == EMPTY] = 0
    exchange = make_exchange(case.transport, group, shape_of(case, group.world_size))
    return ExpertLayer(local, placement, group, case.numerics, exchange=exchange)


def shape_of(case: Case, num_ranks: int) -> ExchangeShape:
    return ExchangeShape(
        num_ranks=num_ranks,
        slots_per_rank=placement_of(case, num_ranks).slots_per_rank,
        experts_per_token=case.chosen,
        hidden=case.width,
        element_bytes=case.dtype.itemsize,
        max_tokens_per_rank=max(case.tokens_of_rank),
        numerics=case.numerics,
        payload=case.payload,
    )


def tokens_of(case: Case, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + rank)
    count = case.tokens_of_rank[rank]
    x_TD = torch.randn(count, case.width, generator=generator).to(case.dtype)
    scores_TE = torch.rand(count, case.num_experts, generator=generator)
    if case.routing == "one expert":
        scores_TE[:, 3] = 2
    ids_TK = scores_TE.topk(case.chosen).indices
    if case.routing == "some unrouted":
        ids_TK[torch.rand(count, case.chosen, generator=generator) < 0.3] = -1
    requests_T = torch.full((count,), request_key(f"r{rank}"))
    keys_T = token_keys(requests_T, torch.arange(count))
    return x_TD, ids_TK, torch.rand(count, case.chosen, generator=generator), keys_T


def layer_twice(step_group: StepGroup, cases: Sequence[Case]) -> list[Tensor]:
    """What this rank's tokens get in each case."""
    group = step_group.expert_group
    found = []
    for case in cases:
        layer = layer_of(case, group)
        group.begin_step(case.tokens_of_rank)
        tokens = tokens_of(case, group.rank)
        once, again = layer(*tokens), layer(*tokens)
        assert torch.equal(once, again)
        found.append(once)
    return found


def on_a_single_rank(case: Case) -> list[Tensor]:
    parts = [tokens_of(case, rank) for rank in range(len(case.tokens_of_rank))]
    alone = replace(
        case, redundant=0, load=(), equal_shares=True, numerics="exact", payload="native"
    )
    layer = layer_of(alone, ExpertGroup.single(torch.device("cpu")))
    together = layer(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return list(together.split(list(case.tokens_of_rank)))


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_every_number_of_ranks_gives_the_bits_of_one_rank_however_rows_travel(
    world_size: int,
) -> None:
    cases = [
        replace(case, dtype=dtype, transport=transport)
        for case in CASES.values()
        if len(case.tokens_of_rank) == world_size
        for transport in TRANSPORTS
        for dtype in (torch.float32, torch.bfloat16)
    ]

    of_ranks = run_ranks(layer_twice, world_size, cases)

    for case, *parts in zip(cases, *of_ranks, strict=True):
        for part, whole in zip(parts, on_a_single_rank(case), strict=True):
            assert torch.equal(part, whole), case


@pytest.mark.parametrize("world_size", [4, 8])
def test_fast_numerics_agree_with_exact_ones_to_rounding(world_size: int) -> None:
    cases = [
        replace(case, numerics="fast", transport=transport)
        for case in CASES.values()
        if len(case.tokens_of_rank) == world_size
        for transport in TRANSPORTS
    ]

    of_ranks = run_ranks(layer_twice, world_size, cases)

    for case, *parts in zip(cases, *of_ranks, strict=True):
        for part, whole in zip(parts, on_a_single_rank(case), strict=True):
            torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-5)


def test_the_cases_cover_both_forms_of_exchange() -> None:
    padded = {
        name: sends_padded(case.tokens_of_rank, num_chosen=case.chosen, row_bytes=WIDTH * 2)
        for name, case in CASES.items()
    }
    assert padded["an idle rank"]
    assert not padded["counts exchanged"]


@pytest.mark.parametrize(
    ("payload", "dtype", "bound"),
    [
        ("bf16", torch.float32, 2**-8),
        ("fp8", torch.float32, 2**-4),
        ("fp8", torch.bfloat16, 2**-4),
    ],
    ids=["bf16", "fp8", "fp8 of a bf16 model"],
)
def test_what_a_payload_rounds_stays_within_its_precision(
    payload: Payload, dtype: torch.dtype, bound: float
) -> None:
    case = replace(CASES["an idle rank"], width=256, dtype=dtype, numerics="fast", payload=payload)
    cases = [replace(case, transport=transport) for transport in TRANSPORTS]

    of_ranks = run_ranks(layer_twice, 3, cases)

    whole = torch.cat(on_a_single_rank(case)).float()
    for parts in zip(*of_ranks, strict=True):
        error = (torch.cat(parts).float() - whole).norm() / whole.norm()
        assert 0 < error < bound
