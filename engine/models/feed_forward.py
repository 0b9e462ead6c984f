"""Feed-forward layers: dense, routed to experts, and dense cut into experts.

Gate and up projections are one product, gate rows first. A sparse layer is collective: all ranks
of the group call it in every step, with or without tokens.

Shape suffixes: N tokens   D hidden   I intermediate width   F 2 I, gate then up   E experts
K chosen experts   S expert slots of this rank
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ExpertsConfig
from engine.experts.grouped_gemm import ExpertWeights
from engine.experts.layer import ExpertLayer
from engine.experts.placement import EMPTY
from engine.experts.router import every_expert, group_limited_top_k, softmax_top_k
from engine.layers.activation import silu_and_mul
from engine.layers.linear import Linear
from engine.models.parts import Setting
from engine.weights.reader import WeightReader
from engine.weights.source import Part

ExpertNames = Callable[[int], tuple[str, str, str]]  # expert -> its gate, up and down tensors


class DenseFeedForward:
    def __init__(self, weights: "DenseWeights", setting: Setting) -> None:
        self._gate_up = Linear(weights.gate_up_FD, numerics=setting.numerics)
        self._down = Linear(weights.down_DI, numerics=setting.numerics)

    def __call__(self, x_ND: Tensor) -> Tensor:
        return self._down(silu_and_mul(self._gate_up(x_ND)))


class SparseFeedForward:
    """Routed experts, and beside them a shared expert that sees every token."""

    def __init__(self, weights: "SparseWeights", config: ExpertsConfig, setting: Setting) -> None:
        self._config = config
        self._router = Linear(weights.router_ED, numerics=setting.numerics)
        self._bias_E = weights.bias_E
        self._experts = _expert_layer(weights.experts, setting)
        self._shared = weights.shared.build(setting) if weights.shared else None

    def __call__(self, x_ND: Tensor) -> Tensor:
        ids_NK, weights_NK = self._choose(self._router(x_ND.float()))
        if self._shared is None:
            return self._experts(x_ND, ids_NK, weights_NK)
        pending = self._experts.dispatch(x_ND, ids_NK, weights_NK)
        shared_ND = self._shared(x_ND)  # while tokens are on their way
        return self._experts.combine(pending) + shared_ND

    def _choose(self, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        config = self._config
        if self._bias_E is None:
            return softmax_top_k(
                logits_NE, config.experts_per_token, renormalise=config.renormalised
            )
        return group_limited_top_k(
            logits_NE,
            self._bias_E,
            config.experts_per_token,
            num_groups=config.num_groups,
            kept_groups=config.kept_groups,
            scaling=config.scaling,
            renormalise=config.renormalised,
        )


class SplitFeedForward:
    """A dense layer as experts that are all chosen with weight one: their sum is the layer."""

    def __init__(self, weights: "SplitWeights", setting: Setting) -> None:
        self._num_experts = setting.config.split_dense_experts
        self._experts = _expert_layer(weights.experts, setting)

    def __call__(self, x_ND: Tensor) -> Tensor:
        return self._experts(x_ND, *every_expert(x_ND.shape[0], self._num_experts, x_ND.device))


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseWeights:
    gate_up_FD: Tensor
    down_DI: Tensor

    def build(self, setting: Setting) -> DenseFeedForward:
        return DenseFeedForward(self, setting)


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseWeights:
    router_ED: Tensor  # float32
    bias_E: Tensor | None  # float32; None: experts are scored by softmax
    experts: ExpertWeights
    shared: DenseWeights | None

    def build(self, setting: Setting) -> SparseFeedForward:
        assert setting.config.experts is not None
        return SparseFeedForward(self, setting.config.experts, setting)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitWeights:
    experts: ExpertWeights

    def build(self, setting: Setting) -> SplitFeedForward:
        return SplitFeedForward(self, setting)


def read_dense(weights: WeightReader, prefix: str, *, hidden: int, width: int) -> DenseWeights:
    """``gate_proj``, ``up_proj`` and ``down_proj`` under ``prefix``."""
    return DenseWeights(
        gate_up_FD=weights.take_rows(
            [f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"], [width, width], hidden
        ),
        down_DI=weights.take(f"{prefix}.down_proj.weight", hidden, width),
    )


def read_split(weights: WeightReader, setting: Setting, prefix: str) -> SplitWeights:
    """This rank's slices of a dense layer: rows of gate and up, columns of down."""
    config = setting.config
    hidden, whole = config.hidden_width, config.intermediate_width
    width = whole // config.split_dense_experts

    def read(expert: int) -> tuple[Tensor, Tensor, Tensor]:
        units = slice(expert * width, (expert + 1) * width)
        rows, columns = Part(rows=units), Part(columns=units)
        return (
            weights.take(f"{prefix}.gate_proj.weight", whole, hidden, part=rows),
            weights.take(f"{prefix}.up_proj.weight", whole, hidden, part=rows),
            weights.take(f"{prefix}.down_proj.weight", hidden, whole, part=columns),
        )

    return SplitWeights(experts=_fill_slots(weights, setting, width, read))


def read_experts(weights: WeightReader, setting: Setting, names: ExpertNames) -> ExpertWeights:
    """The routed experts that this rank holds, each from three tensors of its own."""
    assert setting.config.experts is not None
    hidden, width = setting.config.hidden_width, setting.config.experts.intermediate_width

    def read(expert: int) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = names(expert)
        return (
            weights.take(gate, width, hidden),
            weights.take(up, width, hidden),
            weights.take(down, hidden, width),
        )

    return _fill_slots(weights, setting, width, read)


def _fill_slots(
    weights: WeightReader,
    setting: Setting,
    width: int,
    read: Callable[[int], tuple[Tensor, Tensor, Tensor]],
) -> ExpertWeights:
    assert setting.placement is not None
    slots = setting.placement.slots_of(setting.group.rank)
    hidden = setting.config.hidden_width

    def empty(rows: int, columns: int) -> Tensor:
        shape = (len(slots), rows, columns)
        return torch.zeros(shape, dtype=weights.dtype, device=weights.device)

    gate_up_SFD, down_SDI = empty(2 * width, hidden), empty(hidden, width)
    for slot, expert in enumerate(slots):
        if expert != EMPTY:
            gate_up_SFD[slot, :width], gate_up_SFD[slot, width:], down_SDI[slot] = read(expert)
    return ExpertWeights(gate_up=gate_up_SFD, down=down_SDI)


def _expert_layer(experts: ExpertWeights, setting: Setting) -> ExpertLayer:
    assert setting.placement is not None
    return ExpertLayer(experts, setting.placement, setting.group, setting.numerics)
