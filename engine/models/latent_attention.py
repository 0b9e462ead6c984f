"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; DeepSeek-V3, Kimi K2).

The cache holds per token one normed latent and one rotated key that all heads share. Projections
of the hidden state (queries or their latent, KV latent, rotated key) are one product. Rotated
rows are put in half-split order at load, so the cached key has the order that
``engine.layers.rope`` describes.

Shape suffixes: N tokens   D hidden   H heads   Q query latent   C KV latent   P un-roped width
R roped width   V value width   A rows of the first product   B rows of the query product
X H * (P + V)   O H * V
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention.mla import mla_attention
from engine.batch import ForwardBatch
from engine.config import MlaConfig
from engine.cpu import latent_prefill
from engine.cpu.latent_attention import latent_decode, serves_heads
from engine.cpu.paged_attention import serves
from engine.kvcache.storage import LayerCache
from engine.layers.linear import Linear
from engine.layers.norm import rms_norm
from engine.layers.rope import Rotation, yarn_softmax_factor
from engine.models.parts import Setting
from engine.tensor_parallel import attention_of_rank, heads_here
from engine.weights.orders import half_split_rows
from engine.weights.reader import Wanted, WeightReader
from engine.weights.source import Part


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
        self._project = Linear(weights.read_projection(config), numerics=setting.numerics)
        self._query_norm_Q, self._expand_query = None, None
        if weights.query_norm_Q is not None and weights.query_BQ is not None:
            self._query_norm_Q = weights.query_norm_Q.read()
            self._expand_query = Linear(
                _by_part(weights.query_BQ.read(), config), numerics=setting.numerics
            )
        self._latent_norm_C = weights.latent_norm_C.read()
        expand_HXC = weights.expand_XC.read().view(config.num_heads, -1, config.latent_width)
        self._key_HPC = expand_HXC[:, : config.nope_width].contiguous()
        self._value_HVC = expand_HXC[:, config.nope_width :].contiguous()
        # For the kernels of a CPU: rows of what is added up, and what many rows are multiplied by.
        self._key_HCP: Tensor | None = None
        self._expansions: latent_prefill.Expansions | None = None
        if latent_prefill.serves(config, expand_HXC):
            self._expansions = latent_prefill.Expansions.of(self._key_HPC, self._value_HVC)
        if self._key_HPC.device.type == "cpu" and serves_heads(config):
            self._key_HCP = self._key_HPC.transpose(1, 2).contiguous()
            self._key_HPC = self._key_HCP.transpose(1, 2)  # held once
        self._output = Linear(weights.output_DO.read(), numerics=setting.numerics)
        self._sum = setting.tensor.sum

    def __call__(
        self, x_ND: Tensor, rotation: Rotation, cache: LayerCache, batch: ForwardBatch
    ) -> Tensor:
        q, latent_NC, k_rope_NR = torch.split_with_sizes(
            self._project(x_ND), (self._query_width, self._latent, self._rope), dim=1
        )
        if self._expand_query is not None and self._query_norm_Q is not None:
            q = self._expand_query(rms_norm(q, self._query_norm_Q, self._epsilon))
        latent_NC = rms_norm(latent_NC, self._latent_norm_C, self._epsilon)
        if batch.num_tokens and batch.decode_only and self._key_HCP is not None and serves(cache):
            out_NHV = latent_decode(
                q,
                latent_NC,
                k_rope_NR,
                rotation,
                cache,
                batch,
                w_uk_HCP=self._key_HCP,
                w_uv_HVC=self._value_HVC,
                scale=self._scale,
            )
            return self._sum(self._output(out_NHV.flatten(1)))
        if batch.num_tokens and not batch.decode_only and self._expansions is not None:
            out_NHV = latent_prefill.latent_prefill(
                q,
                latent_NC,
                k_rope_NR,
                rotation,
                cache,
                batch,
                expansions=self._expansions,
                scale=self._scale,
            )
            return self._sum(self._output(out_NHV.flatten(1)))
        q_nope, q_rope = torch.split_with_sizes(
            q, (self._heads * self._nope, self._heads * self._rope), dim=1
        )
        q_rope_NHR = rotation.apply(q_rope.view(-1, self._heads, self._rope))
        k_rope_NR = rotation.apply(k_rope_NR.unsqueeze(1)).squeeze(1)
        out_NHV = mla_attention(
            q_nope.view(-1, self._heads, self._nope),
            q_rope_NHR,
            latent_NC,
            k_rope_NR,
            w_uk_HPC=self._key_HPC,
            w_uv_HVC=self._value_HVC,
            cache=cache,
            batch=batch,
            scale=self._scale,
        )
        return self._sum(self._output(out_NHV.flatten(1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentWeights:
    queries: Wanted  # to the query latent, or to queries where they have no latent
    query_norm_Q: Wanted | None  # None, as query_BQ: queries have no latent
    query_BQ: Wanted | None
    latent_and_key: Wanted
    latent_norm_C: Wanted
    expand_XC: Wanted
    output_DO: Wanted

    def read_projection(self, config: MlaConfig) -> Tensor:
        """(A, D): query latent (or queries), KV latent, rotated key."""
        first, latent_and_key = self.queries.read(), self.latent_and_key.read()
        if config.query_rank is None:
            first = _by_part(first, config)
        latent_CD, key_RD = (
            latent_and_key[: config.latent_width],
            latent_and_key[config.latent_width :],
        )
        return torch.cat((first, latent_CD, _half_split(key_RD, config, heads=1)))

    def build(self, setting: Setting) -> LatentAttention:
        config = attention_of_rank(setting.config.attention, setting.tensor)
        assert isinstance(config, MlaConfig)
        return LatentAttention(self, config, setting)


def describe_latent(weights: WeightReader, setting: Setting, prefix: str) -> LatentWeights:
    """The tensors under ``prefix``, such as ``model.layers.0.self_attn``: of what is per head, this
    rank's heads; latents are made on every rank.
    """
    config, hidden = setting.config.attention, setting.config.hidden_width
    assert isinstance(config, MlaConfig)
    heads, rank, latent = config.num_heads, config.query_rank, config.latent_width
    query_width = config.nope_width + config.rope_width
    expanded_width = config.nope_width + config.value_width
    mine = heads_here(heads, setting.tensor)
    queries_part = _rows_of(mine, query_width)
    query_norm_Q, query_BQ = None, None
    if rank is None:
        queries = weights.want(
            f"{prefix}.q_proj.weight", heads * query_width, hidden, part=queries_part
        )
    else:
        queries = weights.want(f"{prefix}.q_a_proj.weight", rank, hidden)
        query_norm_Q = weights.want(f"{prefix}.q_a_layernorm.weight", rank)
        query_BQ = weights.want(
            f"{prefix}.q_b_proj.weight", heads * query_width, rank, part=queries_part
        )
    return LatentWeights(
        queries=queries,
        query_norm_Q=query_norm_Q,
        query_BQ=query_BQ,
        latent_and_key=weights.want(
            f"{prefix}.kv_a_proj_with_mqa.weight", latent + config.rope_width, hidden
        ),
        latent_norm_C=weights.want(f"{prefix}.kv_a_layernorm.weight", latent),
        expand_XC=weights.want(
            f"{prefix}.kv_b_proj.weight",
            heads * expanded_width,
            latent,
            part=_rows_of(mine, expanded_width),
        ),
        output_DO=weights.want(
            f"{prefix}.o_proj.weight",
            hidden,
            heads * config.value_width,
            part=Part(columns=_rows_of(mine, config.value_width).rows),
        ),
    )


def _rows_of(heads: range, width: int) -> Part:
    return Part(rows=slice(heads.start * width, heads.stop * width))


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
