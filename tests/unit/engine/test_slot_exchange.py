"""Experts move between slots without a new address and without a half-changed layer."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from engine.collectives import ExpertGroup
from engine.experts.grouped_gemm import ExpertWeights
from engine.experts.layer import ExpertLayer
from engine.experts.placement import EMPTY, ExpertPlacement
from engine.experts.slot_exchange import SlotExchange
from protocol.errors import ConfigError

CPU = torch.device("cpu")
EXPERTS, WIDTH, EXPERT_WIDTH = 4, 6, 3
BEFORE = ExpertPlacement(EXPERTS, ((0, 1, 2, 3, EMPTY),))
AFTER = ExpertPlacement(EXPERTS, ((3, 1, 2, 0, EMPTY),))


def expert(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    gate_up = torch.randn(2 * EXPERT_WIDTH, WIDTH, generator=generator)
    return gate_up, torch.randn(WIDTH, EXPERT_WIDTH, generator=generator)


@dataclass
class Library:
    read: list[int] = field(default_factory=list)
    broken: int | None = None

    def __call__(self, number: int) -> tuple[Tensor, Tensor]:
        if number == self.broken:
            raise ConfigError(f"expert {number} is gone")
        self.read.append(number)
        return expert(number)


def a_layer() -> ExpertLayer:
    weights = ExpertWeights(
        gate_up=torch.zeros(5, 2 * EXPERT_WIDTH, WIDTH), down=torch.zeros(5, WIDTH, EXPERT_WIDTH)
    )
    for slot in range(EXPERTS):
        weights.gate_up[slot], weights.down[slot] = expert(slot)
    return ExpertLayer(weights, BEFORE, ExpertGroup.single(CPU), "exact", movable=True)


def answer(layer: ExpertLayer) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    x_TD = torch.randn(7, WIDTH, generator=generator)
    ids_TK = torch.rand(7, EXPERTS, generator=generator).topk(2).indices
    return layer(x_TD, ids_TK, torch.full((7, 2), 0.5), torch.arange(7))


def test_only_slots_that_change_are_read_and_results_stay() -> None:
    layer, library = a_layer(), Library()
    exchange = SlotExchange(layer, BEFORE, seat=0, read=library)
    wanted = answer(layer)
    addresses = layer.weights.gate_up.data_ptr(), layer.weights.down.data_ptr()

    staged = exchange.stage(AFTER)

    assert library.read == [3, 0]
    assert torch.equal(answer(layer), wanted)  # nothing has changed yet
    exchange.commit(staged)
    assert exchange.placement == AFTER
    assert torch.equal(layer.weights.gate_up[0], expert(3)[0])
    assert torch.equal(answer(layer), wanted)
    assert (layer.weights.gate_up.data_ptr(), layer.weights.down.data_ptr()) == addresses


def test_a_slot_that_empties_is_not_read() -> None:
    fuller = ExpertPlacement(EXPERTS, ((0, 1, 2, 3, EMPTY),))
    library = Library()
    exchange = SlotExchange(a_layer(), fuller, seat=0, read=library)
    assert exchange.stage(fuller).slots == ()
    assert library.read == []


def test_a_read_that_fails_leaves_the_layer_as_it_was() -> None:
    layer, library = a_layer(), Library(broken=0)
    exchange = SlotExchange(layer, BEFORE, seat=0, read=library)
    wanted = answer(layer)
    with pytest.raises(ConfigError, match="expert 0 is gone"):
        exchange.stage(AFTER)
    assert torch.equal(answer(layer), wanted)
    assert exchange.placement == BEFORE
