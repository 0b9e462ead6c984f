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
from engine.cpu.experts import serves_tiles
from engine.cpu.packed_weights import in_tiles
from engine.experts.grouped_gemm import ExpertWeights
from engine.experts.layer import ExpertLayer, PendingExperts
from engine.experts.placement import EMPTY
from engine.experts.router import every_expert, group_limited_top_k, softmax_top_k
from engine.experts.slot_exchange import SlotExchange
from engine.layers.activation import silu_and_mul
from engine.layers.linear import Linear
from engine.models.parts import PendingFeedForward, Setting
from engine.tensor_parallel import TensorRanks, span_of_rank
from engine.weights.reader import Wanted, WeightReader, read_rows
from engine.weights.source import Part

ExpertNames = Callable[[int], tuple[str, str, str]]  # expert -> its gate, up and down tensors
ExpertParts = tuple[Wanted, Wanted, Wanted]  # gate, up, down
DescribeExpert = Callable[[WeightReader, int], ExpertParts]


@dataclass(frozen=True, slots=True)
class _Finished:
    """What travels nowhere."""

    y_ND: Tensor

    def compute(self) -> None:
        pass

    def finish(self) -> Tensor:
        return self.y_ND


@dataclass(frozen=True, slots=True)
class _Travelling:
    experts: ExpertLayer
    pending: PendingExperts
    shared_ND: Tensor | None
    ranks: TensorRanks

    def compute(self) -> None:
        self.experts.compute(self.pending)

    def finish(self) -> Tensor:
        y_ND = self.experts.collect(self.pending)
        return self.ranks.sum(y_ND if self.shared_ND is None else y_ND + self.shared_ND)


class DenseFeedForward:
    slots = None

    def __init__(self, weights: "DenseWeights", setting: Setting) -> None:
        self._gate_up = Linear(read_rows(weights.gate_up), numerics=setting.numerics)
        self._down = Linear(weights.down_DI.read(), numerics=setting.numerics)
        self._ranks = setting.tensor

    def __call__(self, x_ND: Tensor, keys_N: Tensor | None = None) -> Tensor:
        del keys_N  # there are no replicas to choose from
        return self._ranks.sum(self.partial(x_ND))

    def partial(self, x_ND: Tensor) -> Tensor:
        """What the units of this rank give: the whole only where no ranks share the layer."""
        return self._down(silu_and_mul(self._gate_up(x_ND)))

    def begin(self, x_ND: Tensor, keys_N: Tensor | None) -> PendingFeedForward:
        return _Finished(self(x_ND, keys_N))


class SparseFeedForward:
    """Routed experts, and beside them a shared expert that sees every token."""

    def __init__(self, weights: "SparseWeights", config: ExpertsConfig, setting: Setting) -> None:
        self._config = config
        self._router = Linear(weights.router_ED.read(), numerics=setting.numerics)
        self._bias_E = weights.bias_E.read() if weights.bias_E else None
        self._experts, self.slots = _expert_layer(weights.experts, setting)
        self._shared = weights.shared.build(setting) if weights.shared else None
        self._counts, self._layer = setting.counts, setting.layer
        self._ranks = setting.tensor

    def __call__(self, x_ND: Tensor, keys_N: Tensor | None) -> Tensor:
        pending = self.begin(x_ND, keys_N)
        pending.compute()
        return pending.finish()

    def begin(self, x_ND: Tensor, keys_N: Tensor | None) -> PendingFeedForward:
        ids_NK, weights_NK = self._choose(self._router(x_ND.float()))
        if self._counts is not None:
            self._counts.add(self._layer, ids_NK)
        pending = self._experts.dispatch(x_ND, ids_NK, weights_NK, keys_N)
        # The shared expert computes while tokens are on their way.
        shared_ND = None if self._shared is None else self._shared.partial(x_ND)
        return _Travelling(self._experts, pending, shared_ND, self._ranks)

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
        self._experts, self.slots = _expert_layer(weights.experts, setting)
        self._ranks = setting.tensor

    def __call__(self, x_ND: Tensor, keys_N: Tensor | None) -> Tensor:
        pending = self.begin(x_ND, keys_N)
        pending.compute()
        return pending.finish()

    def begin(self, x_ND: Tensor, keys_N: Tensor | None) -> PendingFeedForward:
        ids_NE, weights_NE = every_expert(x_ND.shape[0], self._num_experts, x_ND.device)
        pending = self._experts.dispatch(x_ND, ids_NE, weights_NE, keys_N)
        return _Travelling(self._experts, pending, None, self._ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseWeights:
    gate_up: tuple[Wanted, Wanted]
    down_DI: Wanted

    def build(self, setting: Setting) -> DenseFeedForward:
        return DenseFeedForward(self, setting)


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseWeights:
    router_ED: Wanted  # float32
    bias_E: Wanted | None  # float32; None: experts are scored by softmax
    experts: "SlotWeights"
    shared: DenseWeights | None

    def build(self, setting: Setting) -> SparseFeedForward:
        assert setting.config.experts is not None
        return SparseFeedForward(self, setting.config.experts, setting)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitWeights:
    experts: "SlotWeights"

    def build(self, setting: Setting) -> SplitFeedForward:
        return SplitFeedForward(self, setting)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotWeights:
    """What goes into each expert slot of this rank; None leaves it empty."""

    reader: WeightReader
    hidden: int
    width: int
    slots: tuple[ExpertParts | None, ...]
    describe: DescribeExpert

    def read_expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """Gate and up (F, D) and down (D, I) of any expert of the layer, as they lie in a slot."""
        return self._read(self.describe(self.reader.again(), expert))

    def read(self) -> ExpertWeights:
        gate_up_SFD = self._zeros(2 * self.width, self.hidden)
        down_SDI = self._zeros(self.hidden, self.width)
        for slot, parts in enumerate(self.slots):
            if parts is not None:
                gate_up_SFD[slot], down_SDI[slot] = self._read(parts)
        return ExpertWeights(gate_up=gate_up_SFD, down=down_SDI, in_tiles=self._in_tiles)

    def _read(self, parts: ExpertParts) -> tuple[Tensor, Tensor]:
        gate, up, down = parts
        gate_up_FD, down_DI = read_rows((gate, up)), down.read()
        if self._in_tiles:
            return in_tiles(gate_up_FD), in_tiles(down_DI)
        return gate_up_FD, down_DI

    @property
    def _in_tiles(self) -> bool:
        reader = self.reader
        return serves_tiles(reader.device, reader.dtype, self.hidden, self.width)

    def _zeros(self, rows: int, columns: int) -> Tensor:
        shape = (len(self.slots), rows, columns)
        return torch.zeros(shape, dtype=self.reader.dtype, device=self.reader.device)


def describe_dense(
    weights: WeightReader, setting: Setting, prefix: str, *, width: int
) -> DenseWeights:
    """``gate_proj``, ``up_proj`` and ``down_proj`` under ``prefix``: this rank's units of them."""
    hidden, units = setting.config.hidden_width, span_of_rank(width, setting.tensor)
    rows, columns = Part(rows=units), Part(columns=units)
    return DenseWeights(
        gate_up=(
            weights.want(f"{prefix}.gate_proj.weight", width, hidden, part=rows),
            weights.want(f"{prefix}.up_proj.weight", width, hidden, part=rows),
        ),
        down_DI=weights.want(f"{prefix}.down_proj.weight", hidden, width, part=columns),
    )


def describe_split(weights: WeightReader, setting: Setting, prefix: str) -> SplitWeights:
    """This rank's slices of a dense layer: rows of gate and up, columns of down."""
    config = setting.config
    hidden, whole = config.hidden_width, config.intermediate_width
    width = whole // config.split_dense_experts

    def describe(reader: WeightReader, expert: int) -> ExpertParts:
        units = slice(expert * width, (expert + 1) * width)
        rows, columns = Part(rows=units), Part(columns=units)
        return (
            reader.want(f"{prefix}.gate_proj.weight", whole, hidden, part=rows),
            reader.want(f"{prefix}.up_proj.weight", whole, hidden, part=rows),
            reader.want(f"{prefix}.down_proj.weight", hidden, whole, part=columns),
        )

    return SplitWeights(experts=_describe_slots(weights, setting, width, describe))


def describe_experts(weights: WeightReader, setting: Setting, names: ExpertNames) -> SlotWeights:
    """The routed experts that this rank holds, each from three tensors of its own."""
    assert setting.config.experts is not None
    hidden, width = setting.config.hidden_width, setting.config.experts.intermediate_width

    def describe(reader: WeightReader, expert: int) -> ExpertParts:
        gate, up, down = names(expert)
        return (
            reader.want(gate, width, hidden),
            reader.want(up, width, hidden),
            reader.want(down, hidden, width),
        )

    return _describe_slots(weights, setting, width, describe)


def _describe_slots(
    weights: WeightReader, setting: Setting, width: int, describe: DescribeExpert
) -> SlotWeights:
    return SlotWeights(
        reader=weights,
        hidden=setting.config.hidden_width,
        width=width,
        slots=tuple(
            None if expert == EMPTY else describe(weights, expert)
            for expert in setting.placement.slots_of(setting.group.seat)
        ),
        describe=describe,
    )


def _expert_layer(
    experts: SlotWeights, setting: Setting
) -> tuple[ExpertLayer, SlotExchange | None]:
    layer = ExpertLayer(
        experts.read(),
        setting.placement,
        setting.group,
        setting.numerics,
        exchange=setting.exchange,
        layer=setting.layer,
        movable=setting.movable and setting.chooses_replicas,
    )
    if not setting.movable:
        return layer, None
    seat = setting.group.seat
    return layer, SlotExchange(layer, setting.placement, seat=seat, read=experts.read_expert)
