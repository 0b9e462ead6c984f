from collections.abc import Generator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engine.collectives import ExpertGroup
from engine.experts import grouped_gemm
from engine.experts.grouped_gemm import ExpertWeights
from engine.experts.layer import ExpertLayer, Numerics, only_here
from engine.experts.placement import place_evenly
from engine.experts.router import every_expert

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    num_experts: int
    width: int
    expert_width: int
    chosen: int


SHAPES = [Shape(8, 64, 32, 2), Shape(5, 33, 17, 5), Shape(40, 48, 100, 4), Shape(3, 16, 8, 1)]


def weights_of(shape: Shape, dtype: torch.dtype = torch.float32) -> ExpertWeights:
    generator = torch.Generator().manual_seed(1)
    experts, width, inner = shape.num_experts, shape.width, shape.expert_width
    return ExpertWeights(
        gate_up=(torch.randn(experts, 2 * inner, width, generator=generator) * 0.2).to(dtype),
        down=(torch.randn(experts, width, inner, generator=generator) * 0.2).to(dtype),
    )


def layer_of(
    shape: Shape, dtype: torch.dtype = torch.float32, numerics: Numerics = "exact"
) -> ExpertLayer:
    placement = place_evenly(shape.num_experts, 1)
    return ExpertLayer(weights_of(shape, dtype), placement, ExpertGroup.single(CPU), numerics)


def tokens_of(
    shape: Shape, count: int, dtype: torch.dtype = torch.float32, *, crowded: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """``crowded``: all tokens choose expert 0, and one in four nobody else's."""
    generator = torch.Generator().manual_seed(count)
    x_TD = torch.randn(count, shape.width, generator=generator).to(dtype)
    scores_TE = torch.rand(count, shape.num_experts, generator=generator)
    if crowded:
        scores_TE[:, 0] = 2
    ids_TK = scores_TE.topk(shape.chosen).indices
    return x_TD, ids_TK, torch.rand(count, shape.chosen, generator=generator)


def reference(weights: ExpertWeights, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Token by token and expert by expert, in fp64."""
    out_TD = torch.zeros_like(x_TD, dtype=torch.float64)
    for token, (ids, shares) in enumerate(zip(ids_TK.tolist(), weights_TK.tolist(), strict=True)):
        for expert, share in zip(ids, shares, strict=True):
            if expert >= 0:
                gate, up = (weights.gate_up[expert].double() @ x_TD[token].double()).chunk(2)
                y = weights.down[expert].double() @ (functional.silu(gate) * up)
                out_TD[token] += share * y
    return out_TD


@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize("crowded", [False, True], ids=["spread", "crowded"])
@pytest.mark.parametrize("count", [0, 1, 3, 64, 300])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_token_gets_the_weighted_sum_of_its_experts(
    shape: Shape, count: int, crowded: bool, numerics: Numerics
) -> None:
    tokens = tokens_of(shape, count, crowded=crowded)

    found = layer_of(shape, numerics=numerics)(*tokens)

    wanted = reference(weights_of(shape), *tokens).float()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture
def one_thread() -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_token_gets_the_same_bits_alone_and_in_any_batch(
    shape: Shape, dtype: torch.dtype, threads: int
) -> None:
    layer = layer_of(shape, dtype)
    tokens = tokens_of(shape, 700, dtype, crowded=True)
    whole = layer(*tokens)
    torch.set_num_threads(threads)

    for some in (range(1), range(699, 700), range(5, 12), range(0, 700, 3), range(699, -1, -1)):
        index = torch.tensor(list(some))
        part = layer(*(column[index] for column in tokens))
        assert torch.equal(part, whole[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_machine_that_needs_fixed_tiles_computes_the_same(
    shape: Shape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tokens_of(shape, 300, dtype, crowded=True)
    padded = layer_of(shape, dtype)(*tokens)
    monkeypatch.setattr(grouped_gemm, "_padding_suffices", lambda *_: False)

    tiled = layer_of(shape, dtype)

    whole = tiled(*tokens)
    assert torch.equal(tiled(*(column[7:19] for column in tokens)), whole[7:19])
    torch.testing.assert_close(whole, padded)


def test_ids_of_minus_one_add_nothing() -> None:
    shape = SHAPES[0]
    x_TD, ids_TK, weights_TK = tokens_of(shape, 20)
    ids_TK[::2, 1] = -1
    ids_TK[4] = -1

    found = layer_of(shape)(x_TD, ids_TK, weights_TK)

    wanted = reference(weights_of(shape), x_TD, ids_TK, weights_TK).float()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not found[4].any()


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_a_poisoned_token_stays_alone(numerics: Numerics) -> None:
    shape = SHAPES[0]
    x_TD, ids_TK, weights_TK = tokens_of(shape, 20)
    layer = layer_of(shape, numerics=numerics)
    healthy = layer(x_TD, ids_TK, weights_TK)
    x_TD[0] = float("nan")

    found = layer(x_TD, ids_TK, weights_TK)

    assert found[0].isnan().all()
    assert torch.equal(found[1:], healthy[1:])


def test_a_dense_ffn_cut_into_experts_is_the_dense_ffn() -> None:
    shape = Shape(24, 48, 16, 24)
    weights = weights_of(shape)
    x_TD = tokens_of(shape, 9)[0]
    gate_ED, up_ED = (part.flatten(0, 1) for part in weights.gate_up.chunk(2, dim=1))
    down_DE = weights.down.transpose(0, 1).flatten(1)

    found = layer_of(shape)(x_TD, *every_expert(9, 24, CPU))

    wanted = (functional.silu(x_TD @ gate_ED.t()) * (x_TD @ up_ED.t())) @ down_DE.t()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_weights_keep_their_precision_beside_bf16_rows() -> None:
    shape = SHAPES[3]
    x_TD, ids_TK, weights_TK = tokens_of(shape, 50, torch.bfloat16)
    layer = layer_of(shape, torch.bfloat16)
    plain = layer(x_TD, ids_TK, torch.ones_like(weights_TK)).double()
    share = 1 + 2**-9  # half way between two bf16 numbers

    found = layer(x_TD, ids_TK, torch.full_like(weights_TK, share)).double()

    assert ((found - plain * share).abs() <= plain.abs() * share * 2**-8 * 0.5001).all()


def test_a_shared_expert_may_run_between_the_halves() -> None:
    shape = SHAPES[0]
    tokens = tokens_of(shape, 20)
    layer = layer_of(shape)

    pending = layer.dispatch(*tokens)
    other = layer(*tokens_of(shape, 7))

    assert torch.equal(layer.combine(pending), layer(*tokens))
    assert torch.equal(other, layer(*tokens_of(shape, 7)))


def test_silu_of_bf16_is_the_same_in_vector_loops_and_scalar_tails() -> None:
    """What the exact activation relies on, for every bf16 number."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(torch.bfloat16)
    numbers = numbers[~numbers.isnan()]
    in_tails = torch.cat([functional.silu(part.clone()) for part in numbers.split(7)])
    torch.testing.assert_close(functional.silu(numbers), in_tails, rtol=0, atol=0, equal_nan=True)


def test_columns_of_experts_elsewhere_are_left_out_and_the_others_keep_their_order() -> None:
    slots = torch.tensor([[-1, 1, -1, 0], [-1, -1, -1, -1], [0, -1, -1, 1]])
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8], [0.9, 1.0, 1.1, 1.2]])
    fewer, their_weights = only_here(slots, weights, 2)
    assert fewer.tolist() == [[1, 0], [-1, -1], [0, 1]]
    assert torch.equal(their_weights[fewer >= 0], torch.tensor([0.2, 0.4, 0.9, 1.2]))
    assert only_here(slots, weights, 4) == (slots, weights)
