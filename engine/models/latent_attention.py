"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, Kimi K2).

The cache holds per token one normed latent and one rotated key that all heads share. Projections
of the hidden state (queries or their latent, KV latent, rotated key) are one product. Rotated
rows are put in half-split order at load, so the cached key has the order that
``engine.layers.rope`` describes.

Shape suffixes: N tokens   D hidden   H heads   Q query latent   C KV latent   P un-roped width
R roped width   V value width   A rows of the first product   B rows of the query product
O H * V
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention.mla import mla_attention
from engine.batch import ForwardBatch
from engine.config import MlaConfig
from engine.kvcache.storage import LayerCache
from engine.layers.linear import Linear
from engine.layers.norm import rms_norm
from engine.layers.rope import Rotation, yarn_softmax_factor
from engine.models.parts import Setting
from engine.weights.orders import half_split_rows
from engine.weights.reader import WeightReader


class LatentAttention:
    def __init__(self, weights: "LatentWeights", config: MlaConfig, setting: Setting) -> None:
        self._heads, self._nope, self._rope = (
            config.num_heads,
            config.nope_width,
            config.rope_width,
        )
        self._latent = config.latent_width
        width = config.nope_width + config.rope_width
        self._query_width = config.query_rank or config.num_heads * width
        self._scale = width**-0.5 * yarn_softmax_factor(setting.config.rope)
        self._epsilon = setting.config.norm_epsilon
        self._project = Linear(weights.projection_AD, numerics=setting.numerics)
        self._query_norm_Q = weights.query_norm_Q
        self._expand_query = (
            None
            if weights.query_BQ is None
            else Linear(weights.query_BQ, numerics=setting.numerics)
        )
        self._latent_norm_C = weights.latent_norm_C
        self._key_HPC, self._value_HVC = weights.key_HPC, weights.value_HVC
        self._output = Linear(weights.output_DO, numerics=setting.numerics)

    def __call__(
        self, x_ND: Tensor, rotation: Rotation, cache: LayerCache, batch: ForwardBatch
    ) -> Tensor:
        q, latent_NC, k_rope_NR = torch.split_with_sizes(
            self._project(x_ND), (self._query_width, self._latent, self._rope), dim=1
        )
        if self._expand_query is not None and self._query_norm_Q is not None:
            q = self._expand_query(rms_norm(q, self._query_norm_Q, self._epsilon))
        q_nope, q_rope = torch.split_with_sizes(
            q, (self._heads * self._nope, self._heads * self._rope), dim=1
        )
        q_rope_NHR = rotation.apply(q_rope.view(-1, self._heads, self._rope))
        k_rope_NR = rotation.apply(k_rope_NR.unsqueeze(1)).squeeze(1)
        out_NHV = mla_attention(
            q_nope.view(-1, self._heads, self._nope),
            q_rope_NHR,
            rms_norm(latent_NC, self._latent_norm_C, self._epsilon),
            k_rope_NR,
            w_uk_HPC=self._key_HPC,
            w_uv_HVC=self._value_HVC,
            cache=cache,
            batch=batch,
            scale=self._scale,
        )
        return self._output(out_NHV.flatten(1))


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentWeights:
    projection_AD: Tensor  # query latent (or queries), KV latent, rotated key
    query_norm_Q: Tensor | None  # None, as query_BQ: queries have no latent
    query_BQ: Tensor | None  # un-roped rows of all heads, then roped rows of all heads
    latent_norm_C: Tensor
    key_HPC: Tensor
    value_HVC: Tensor
    output_DO: Tensor

    def build(self, setting: Setting) -> LatentAttention:
        config = setting.config.attention
        assert isinstance(config, MlaConfig)
        return LatentAttention(self, config, setting)


def read_latent(weights: WeightReader, setting: Setting, prefix: str) -> LatentWeights:
    """The tensors under ``prefix``, such as ``model.layers.0.self_attn``."""
    config, hidden = setting.config.attention, setting.config.hidden_width
    assert isinstance(config, MlaConfig)
    heads, rank, latent = config.num_heads, config.query_rank, config.latent_width
    query_rows = heads * (config.nope_width + config.rope_width)
    query_norm_Q, query_BQ = None, None
    if rank is None:
        first = _by_part(weights.take(f"{prefix}.q_proj.weight", query_rows, hidden), config)
    else:
        first = weights.take(f"{prefix}.q_a_proj.weight", rank, hidden)
        query_norm_Q = weights.take(f"{prefix}.q_a_layernorm.weight", rank)
        query_BQ = _by_part(weights.take(f"{prefix}.q_b_proj.weight", query_rows, rank), config)
    latent_and_key = weights.take(
        f"{prefix}.kv_a_proj_with_mqa.weight", latent + config.rope_width, hidden
    )
    expand_rows = heads * (config.nope_width + config.value_width)
    expand_HXC = weights.take(f"{prefix}.kv_b_proj.weight", expand_rows, latent).view(
        heads, -1, latent
    )
    rotated_RD = _half_split(latent_and_key[latent:], config, heads=1)
    return LatentWeights(
        projection_AD=torch.cat((first, latent_and_key[:latent], rotated_RD)),
        query_norm_Q=query_norm_Q,
        query_BQ=query_BQ,
        latent_norm_C=weights.take(f"{prefix}.kv_a_layernorm.weight", latent),
        key_HPC=expand_HXC[:, : config.nope_width].contiguous(),
        value_HVC=expand_HXC[:, config.nope_width :].contiguous(),
        output_DO=weights.take(f"{prefix}.o_proj.weight", hidden, heads * config.value_width),
    )


def _by_part(weight: Tensor, config: MlaConfig) -> Tensor:
    """Rows of all heads' un-roped parts first, then of all heads' roped parts."""
    by_head = weight.view(config.num_heads, -1, weight.shape[1])
    roped = by_head[:, config.nope_width :].flatten(0, 1)
    return torch.cat(
        (
            by_head[:, : config.nope_width].flatten(0, 1),
            _half_split(roped, config, heads=config.num_heads),
        )
    )


def _half_split(rows: Tensor, config: MlaConfig, *, heads: int) -> Tensor:
    return half_split_rows(rows, heads=heads) if config.interleaved_rope else rows
