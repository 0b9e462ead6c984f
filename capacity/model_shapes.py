"""What published models weigh: their shapes, and the bytes of their weights as they are published.

Counts follow the checkpoints: attention, norms, dense and shared feed-forward layers, routers,
embedding and head are on every rank of a decode worker; routed experts are in slots. Layers for
multi-token prediction and vision encoders are left out. How experts are placed is unknown here.
"""

from dataclasses import dataclass
from typing import Literal

from protocol.kv import KVLayout

WeightFormat = Literal["bf16", "fp8-block128", "mxfp4"]

# Bytes of one weight. fp8: one, and a float32 scale for a block of 128 x 128. mxfp4: half, and an
# 8-bit scale for 32 (Open Compute Project, Microscaling Formats 1.0).
BYTES = {"bf16": 2.0, "fp8-block128": 1 + 4 / 128**2, "mxfp4": 0.5 + 1 / 32}


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention with low-rank queries."""

    heads: int
    query_rank: int = 1536
    latent: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128

    def weights(self, hidden: int) -> int:
        queries = self.query_rank * (hidden + self.heads * (self.nope + self.rope))
        latent = hidden * (self.latent + self.rope)
        keys_values = self.latent * self.heads * (self.nope + self.value)
        return queries + latent + keys_values + self.heads * self.value * hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedAttention:
    """Grouped-query attention with biases."""

    heads: int
    kv_heads: int
    width: int

    def weights(self, hidden: int) -> int:
        queries, keys_values = self.heads * self.width, 2 * self.kv_heads * self.width
        return (2 * queries + keys_values) * hidden + queries + keys_values + hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes as in the model's own configuration file."""

    name: str
    hidden: int
    layers: int
    dense_layers: int  # the first ones
    dense_width: int
    experts: int
    experts_per_token: int
    expert_width: int
    shared_experts: int
    vocabulary: int
    attention: LatentAttention | GroupedAttention
    expert_format: WeightFormat
    format: WeightFormat  # of attention, dense and shared layers; embedding and router are bf16
    expert_biases: bool = False  # bf16

    @property
    def expert_layers(self) -> int:
        return self.layers - self.dense_layers

    @property
    def weights(self) -> int:
        """Parameters of the whole model."""
        of_experts = self.experts * self.expert_layers * self._weights_of_expert
        return of_experts + self._replicated_weights + self._plain_weights

    @property
    def expert_bytes(self) -> float:
        """Of one expert of one layer."""
        biases = self._biases_of_expert * BYTES["bf16"]
        matrices = self._weights_of_expert - self._biases_of_expert
        return matrices * BYTES[self.expert_format] + biases

    @property
    def replicated_bytes(self) -> float:
        """What every rank holds beside its expert slots."""
        plain = self._plain_weights * BYTES["bf16"]
        return self._replicated_weights * BYTES[self.format] + plain

    @property
    def kv_bytes_per_token(self) -> int:
        """On the one rank that a request is on, in bfloat16."""
        return self._layout.block_bytes

    @property
    def _layout(self) -> KVLayout:
        """Blocks of one token."""
        kind = self.attention
        if isinstance(kind, LatentAttention):
            return KVLayout(
                kind="mla",
                dtype="bfloat16",
                num_layers=self.layers,
                block_tokens=1,
                kv_heads=1,
                key_width=kind.latent + kind.rope,
                value_width=0,
            )
        return KVLayout(
            kind="gqa",
            dtype="bfloat16",
            num_layers=self.layers,
            block_tokens=1,
            kv_heads=kind.kv_heads,
            key_width=kind.width,
            value_width=kind.width,
        )

    @property
    def _biases_of_expert(self) -> int:
        return 2 * self.expert_width + self.hidden if self.expert_biases else 0

    @property
    def _weights_of_expert(self) -> int:
        return 3 * self.hidden * self.expert_width + self._biases_of_expert

    @property
    def _replicated_weights(self) -> int:
        shared = 3 * self.hidden * self.expert_width * self.shared_experts * self.expert_layers
        dense = 3 * self.hidden * self.dense_width * self.dense_layers
        return self.attention.weights(self.hidden) * self.layers + shared + dense

    @property
    def _plain_weights(self) -> int:
        """Embedding, head, routers and the two norms of every layer and the last one."""
        routers = self.hidden * self.experts * self.expert_layers
        return (2 * self.vocabulary + 2 * self.layers + 1) * self.hidden + routers


MODELS = (
    ModelShape(
        name="DeepSeek-R1",
        hidden=7168,
        layers=61,
        dense_layers=3,
        dense_width=18432,
        experts=256,
        experts_per_token=8,
        expert_width=2048,
        shared_experts=1,
        vocabulary=129280,
        attention=LatentAttention(heads=128),
        expert_format="fp8-block128",
        format="fp8-block128",
    ),
    ModelShape(
        name="Kimi K2",
        hidden=7168,
        layers=61,
        dense_layers=1,
        dense_width=18432,
        experts=384,
        experts_per_token=8,
        expert_width=2048,
        shared_experts=1,
        vocabulary=163840,
        attention=LatentAttention(heads=64),
        expert_format="fp8-block128",
        format="fp8-block128",
    ),
    ModelShape(
        name="gpt-oss-120b",
        hidden=2880,
        layers=36,
        dense_layers=0,
        dense_width=0,
        experts=128,
        experts_per_token=4,
        expert_width=2880,
        shared_experts=0,
        vocabulary=201088,
        attention=GroupedAttention(heads=64, kv_heads=8, width=64),
        expert_format="mxfp4",
        format="bf16",
        expert_biases=True,
    ),
    ModelShape(
        name="Mistral Large 3",
        hidden=7168,
        layers=61,
        dense_layers=3,
        dense_width=16384,
        experts=128,
        experts_per_token=4,
        expert_width=4096,
        shared_experts=1,
        vocabulary=131072,
        attention=LatentAttention(heads=128),
        expert_format="fp8-block128",
        format="fp8-block128",
    ),
)
