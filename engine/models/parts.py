"""The interfaces between a decoder and the two halves of its layers.

An architecture first describes each layer by the tensors it wants; building the description
reads them. So a checkpoint is checked whole before any of it is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from engine.batch import ForwardBatch
from engine.collectives import ExpertGroup
from engine.config import ModelConfig
from engine.experts.counting import ExpertCounts
from engine.experts.placement import ExpertPlacement
from engine.experts.slot_exchange import SlotExchange
from engine.experts.transports import RowExchange
from engine.kvcache.storage import LayerCache
from engine.layers.linear import Numerics
from engine.layers.rope import Rotation
from engine.pipeline import ALL_LAYERS, Stage
from engine.tensor_parallel import TensorRanks, Undivided
from engine.weights.reader import Wanted, WeightReader

# Shape suffixes: N tokens of this step   D hidden

_UNDIVIDED = Undivided()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a model is built for: its sizes, and this rank's place among the experts' ranks.

    ``tensor`` are the ranks that share each layer, which is then built as the part of this one.
    Only the layers of ``stage`` are. ``layer`` is the one that is being described or built.
    """

    config: ModelConfig
    numerics: Numerics
    group: ExpertGroup
    placements: Sequence[ExpertPlacement]  # by layer; empty: the model has no expert slots
    exchange: RowExchange | None  # None: the model has no expert slots
    movable: bool = False  # experts may change their slots while the model is in use
    counts: ExpertCounts | None = None  # None: choices are not counted
    layer: int = 0
    tensor: TensorRanks = _UNDIVIDED
    stage: Stage = ALL_LAYERS

    @property
    def placement(self) -> ExpertPlacement:
        return self.placements[self.layer]

    @property
    def chooses_replicas(self) -> bool:
        if self.group.num_seats == 1:
            return False
        return self.movable or any(placement.has_replicas for placement in self.placements)

    def of_layer(self, layer: int) -> "Setting":
        return replace(self, layer=layer)


class Attention(Protocol):
    def __call__(
        self, x_ND: Tensor, rotation: Rotation, cache: LayerCache, batch: ForwardBatch
    ) -> Tensor:
        """(N, D) to add to the residual; afterwards the cache holds these tokens' KV."""
        ...


class PendingFeedForward(Protocol):
    """A feed-forward layer whose rows are on their way to experts. Called once each, in order."""

    def compute(self) -> None:
        """Serve what has arrived here."""
        ...

    def finish(self) -> Tensor:
        """(N, D) to add to the residual."""
        ...


class FeedForward(Protocol):
    @property
    def slots(self) -> SlotExchange | None:
        """How its experts move; None where there are none, or they stay."""
        ...

    def __call__(self, x_ND: Tensor, keys_N: Tensor | None) -> Tensor:
        """(N, D) to add to the residual. Sparse ones are collective: all ranks call, N may be 0.

        ``keys_N`` are ``engine.experts.replicas.token_keys``, or None where there is no choice.
        """
        ...

    def begin(self, x_ND: Tensor, keys_N: Tensor | None) -> PendingFeedForward:
        """The call in three parts, so that something else may be computed between them."""
        ...


class AttentionWeights(Protocol):
    def build(self, setting: Setting) -> Attention:
        """Read the tensors."""
        ...


class FeedForwardWeights(Protocol):
    def build(self, setting: Setting) -> FeedForward:
        """Read the tensors."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    attention_norm_D: Wanted
    attention: AttentionWeights
    feed_forward_norm_D: Wanted
    feed_forward: FeedForwardWeights


class DescribeLayer(Protocol):
    """What an architecture is: how the tensors of one of its layers are named and used.

    Raises:
        ConfigError: a tensor is missing or misshapen.
    """

    def __call__(self, weights: WeightReader, setting: Setting, layer: int) -> LayerWeights: ...
