"""What a model is: its sizes and switches, checked, whatever file they were read from.

A ``ModelConfig`` that exists is complete and consistent; nothing below it reads a config file
again. ``engine.config_files`` makes one from ``config.json`` or from GGUF metadata.
"""

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Literal

import msgspec

from protocol.errors import ConfigError
from protocol.kv import KVLayout

Architecture = Literal["llama", "mixtral", "qwen3_moe", "deepseek_v3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Positions are divided by ``factor``."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's scaling: low frequencies are divided by ``factor``, high ones kept."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071), with DeepSeek's ``mscale`` pair."""

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0  # 0: not in the file
    mscale_all_dims: float = 0.0
    attention_factor: float | None = None  # None: derived from factor and the mscale pair
    truncated: bool = True  # ramp ends are rounded outwards to whole dimensions


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    theta: float
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GqaConfig:
    """Grouped-query attention: ``num_heads`` queries share ``num_kv_heads`` keys and values."""

    num_heads: int
    num_kv_heads: int
    head_width: int
    qk_norm: bool = False  # RMSNorm of every query and key head before rope


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

    num_heads: int
    query_rank: int | None  # None: queries are projected directly
    latent_width: int
    nope_width: int
    rope_width: int
    value_width: int
    interleaved_rope: bool = True  # the checkpoint's rope pairs are neighbours (2i, 2i + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """The routed and shared experts of the sparse layers."""

    num_experts: int
    experts_per_token: int
    intermediate_width: int
    scoring: Literal["softmax", "sigmoid"]
    renormalised: bool
    scaling: float = 1.0
    num_groups: int = 1
    kept_groups: int = 1
    shared_width: int = 0  # hidden units of all shared experts together


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    architecture: Architecture
    vocab_size: int
    hidden_width: int
    num_layers: int
    intermediate_width: int  # of dense feed-forward layers
    norm_epsilon: float
    max_model_len: int  # tokens, prompt and output together
    tied_embeddings: bool
    attention: GqaConfig | MlaConfig
    rope: RopeConfig
    experts: ExpertsConfig | None
    sparse_layers: tuple[bool, ...]  # by layer: does it have routed experts
    bos_token_id: int | None
    stop_token_ids: tuple[int, ...]  # ascending; end of sequence, end of turn
    split_dense_experts: int = 0  # dense layers are served as this many always-chosen experts

    @property
    def num_routed_experts(self) -> int:
        """Experts that need slots on the ranks; 0 for a dense model served densely."""
        return self.experts.num_experts if self.experts else self.split_dense_experts

    def layout(self, *, dtype: str, block_tokens: int) -> KVLayout:
        """The KV cache of one rank: attention is data-parallel, so every rank has all heads."""
        kind = self.attention
        if isinstance(kind, MlaConfig):
            return KVLayout(
                kind="mla",
                dtype=dtype,
                num_layers=self.num_layers,
                block_tokens=block_tokens,
                kv_heads=1,
                key_width=kind.latent_width + kind.rope_width,
                value_width=0,
            )
        return KVLayout(
            kind="gqa",
            dtype=dtype,
            num_layers=self.num_layers,
            block_tokens=block_tokens,
            kv_heads=kind.num_kv_heads,
            key_width=kind.head_width,
            value_width=kind.head_width,
        )

    def digest(self) -> str:
        return hashlib.sha256(msgspec.json.encode(asdict(self))).hexdigest()[:16]


def split_dense(config: ModelConfig, count: int) -> ModelConfig:
    """``config`` with every dense feed-forward layer cut into ``count`` experts of equal width.

    Each expert has its own hidden units, all experts are chosen with weight one, and so their
    sum is the dense layer.

    Raises:
        ConfigError: the model already has experts, or the width is not divisible.
    """
    if config.experts is not None:
        raise ConfigError(
            f"split_dense_experts={count}: a {config.architecture} model has experts of its own; "
            "set split_dense_experts to 0"
        )
    if count < 1 or config.intermediate_width % count:
        raise ConfigError(
            f"split_dense_experts={count} does not divide the feed-forward width "
            f"{config.intermediate_width}; choose one of its divisors"
        )
    return replace(config, split_dense_experts=count, sparse_layers=(True,) * config.num_layers)
